"""A small load client: streams of /v1/completions over plain asyncio sockets, with the time of every piece.

It parses no JSON while the clock runs, so that little of what is measured is its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ends with the benchmark, even where that is killed.
_SERVE = """
import sys
from trine.serve.parent import end_with_parent
end_with_parent(int(sys.argv.pop(1)))
from trine.cli.main import main
main()
"""


@dataclass(frozen=True)
class Stream:
    """One answer: seconds from the request to its first piece, and to the end; tokens, and those from the cache."""

    first_seconds: float
    seconds: float
    tokens: int
    cached_tokens: int
    token_ids: list[int]


class ServerProcess:
    """`trine serve` on a free port of this machine."""

    def __init__(self, checkpoint: Path, *options: str) -> None:
        command = [sys.executable, "-c", _SERVE, str(os.getpid()), "serve", str(checkpoint), "--port", "0", *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if found := re.match(r"serving .* at http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(found[1])
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(said))
        self._reader = threading.Thread(target=self._process.stderr.read, daemon=True)
        self._reader.start()

    def metrics(self) -> dict[str, float]:
        """The page of /metrics, without labels and buckets."""
        page = asyncio.run(_request(self.port, "GET", "/metrics", b"")).decode()
        lines = re.findall(r"^(trine_\w+) (\S+)$", page, re.MULTILINE)
        return {name: float(value) for name, value in lines}

    def streams(self, bodies: list[dict[str, Any]]) -> list[Stream]:
        """All at once."""

        async def run() -> list[Stream]:
            return await asyncio.gather(*(_stream(self.port, body) for body in bodies))

        return asyncio.run(run())

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(60)
        self._reader.join(60)
        assert self._process.stderr is not None
        self._process.stderr.close()


async def _request(port: int, method: str, path: str, body: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    return answer


async def _stream(port: int, body: dict[str, Any]) -> Stream:
    asked = {**body, "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    data = json.dumps(asked).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    frames, first = [], 0.0
    async for line in reader:
        if line.startswith(b"data: "):
            first = first or time.perf_counter()
            frames.append(line)
    ended = time.perf_counter()
    writer.close()
    if len(frames) < 2 or frames[-1] != b"data: [DONE]\n":
        raise RuntimeError(f"not a complete stream: {frames[-1:]}")
    pieces = [json.loads(frame[6:]) for frame in frames[:-1]]
    usage = pieces[-1]["usage"]
    ids = [token for piece in pieces[:-1] for token in piece["choices"][0]["token_ids"]]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Stream(first - started, ended - started, usage["completion_tokens"], cached, ids)
