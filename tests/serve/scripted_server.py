"""A real server around `scripted_engine.py`: `scripted_server.py SETTINGS LOG STEP_SECONDS`, SETTINGS being JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trine.serve.messages import Start
from trine.serve.server import serve
from trine.serve.settings import ServerSettings

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    start = Start(**settings.pop("start"))
    if "adapter_root" in settings:
        settings["adapter_root"] = Path(settings["adapter_root"])
    command = [sys.executable, str(Path(__file__).with_name("scripted_engine.py")), *sys.argv[2:]]
    sys.exit(serve(ServerSettings(start=start, names=("scripted",), port=0, **settings), engine_command=command))
