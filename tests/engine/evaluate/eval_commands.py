"""Several `trine eval` in one process, since loading the harness takes seconds: `eval_commands.py ARGUMENTS`.

ARGUMENTS is a JSON list of lists. Prints for each of them, on one line, its exit status, stdout and stderr as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

from trine.cli.main import main


def run(arguments: list[str]) -> tuple[object, str, str]:
    sys.argv = ["trine", "eval", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            return stop.code, out.getvalue(), err.getvalue()
    raise AssertionError("main returned")


if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        print(json.dumps(run(arguments)), flush=True)
