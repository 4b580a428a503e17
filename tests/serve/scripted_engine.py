"""An engine for tests, run as a process: `scripted_engine.py LOG STEP_SECONDS SOCKET`.

Every step gives each choice one token, `START + number`, whose text is a letter, until `max_tokens`. What a request
does beyond that is scripted by the first id of its prompt. Everything that happens is written to LOG, a JSON object a
line.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

from trine.engine.errors import ContextLengthError, QueueFullError, UsageError
from trine.serve.messages import Delta, Logprob, Pool, Pooling, Ready, Start, Stats, Submit
from trine.serve.worker import connect, work

PLAIN, REFUSED, TOO_LONG, FULL, MISTAKE, FAILS_LATER, STEP_RAISES, DIES, HANGS, LARGE, SILENT = range(11)
START = 40
LARGE_TEXT = "x" * 2**16


class ScriptedEngine:
    def __init__(self, log: Path, step_seconds: float) -> None:
        self._log = log.open("a", buffering=1)
        self._step_seconds = step_seconds
        self._requests: dict[str, Submit] = {}
        self._pools: dict[str, Pool] = {}
        self._given: dict[str, int] = {}
        self._steps = 0

    def write(self, event: str, **values: Any) -> None:
        self._log.write(json.dumps({"event": event, "step": self._steps, **values}) + "\n")

    def add(self, request: Submit | Pool) -> None:
        if isinstance(request, Pool):
            script = request.inputs[0][0]
            self.write("add", id=request.id, script=script, inputs=len(request.inputs))
        else:
            script = request.prompt_ids[0]
            self.write("add", id=request.id, script=script, salt=request.salt, priority=request.priority)
        errors = {
            REFUSED: UsageError("temperature 99 is too hot"),
            TOO_LONG: ContextLengthError("the prompt is too long for the cache"),
            FULL: QueueFullError("9 are waiting"),
            MISTAKE: KeyError("a mistake"),
        }
        if script in errors:
            raise errors[script]
        if isinstance(request, Pool):
            self._pools[request.id] = request
            return
        self._requests[request.id] = request
        self._given[request.id] = 0

    def abort(self, request_id: str) -> None:
        self.write("abort", id=request_id, known=request_id in self._requests or request_id in self._pools)
        self._requests.pop(request_id, None)
        self._pools.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._pools)

    def step(self) -> list[Delta]:
        time.sleep(self._step_seconds)
        self._steps += 1
        pooled = [delta for pool in list(self._pools.values()) for delta in self._vectors(pool)]
        return pooled + [delta for request in list(self._requests.values()) for delta in self._advance(request)]

    def _vectors(self, pool: Pool) -> list[Delta]:
        script = pool.inputs[0][0]
        if script == SILENT:
            return []
        del self._pools[pool.id]
        if script == FAILS_LATER:
            return [Delta(id=pool.id, finish_reason="error", error="numbers are not finite")]
        return [
            Delta(id=pool.id, choice=number, finish_reason="stop", prompt_tokens=len(ids), vector=bytes(8))
            for number, ids in enumerate(pool.inputs)
        ]

    def _advance(self, request: Submit) -> list[Delta]:
        script, given = request.prompt_ids[0], self._given[request.id]
        self._given[request.id] += 1
        if script == SILENT:
            return []
        if script == FAILS_LATER and given == 2:
            del self._requests[request.id]
            return [Delta(id=request.id, finish_reason="error", error="logits are not finite")]
        if script == STEP_RAISES:
            raise ZeroDivisionError("a step cannot go on")
        if script == DIES:
            os._exit(7)
        if script == HANGS:
            time.sleep(1000)
        last = given + 1 == request.sampling.max_tokens
        if last:
            self.write("finish", id=request.id)
            del self._requests[request.id]
        token = START + given % 200
        logprob = Logprob(token, -0.5, 1, [(token, -0.5)][: request.sampling.logprobs or 0])
        return [
            Delta(
                id=request.id,
                choice=choice,
                text=LARGE_TEXT if script == LARGE else chr(ord("a") + given % 26),
                token_ids=[token],
                logprobs=[] if request.sampling.logprobs is None else [logprob],
                finish_reason="length" if last else None,
                prompt_tokens=len(request.prompt_ids),
                completion_tokens=given + 1,
                cached_tokens=1,
            )
            for choice in range(request.sampling.n)
        ]

    def load_adapter(self, name: str, folder: str) -> None:
        self.write("load_adapter", name=name, folder=folder)
        if name == "mistake":
            raise KeyError("a mistake")
        if name == "dies":
            os._exit(7)

    def unload_adapter(self, name: str) -> None:
        self.write("unload_adapter", name=name)
        if name == "busy":
            raise UsageError("adapter 'busy' is in use by 1 requests")

    def stats(self) -> Stats:
        return Stats(running=len(self._requests), kv_blocks_used=1, kv_blocks_total=4, steps=self._steps)


def main() -> int:
    log, step_seconds, path = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    engine = ScriptedEngine(log, step_seconds)
    modes = {
        name: oct(stat.S_IMODE(where.stat().st_mode)) for name, where in (("socket", path), ("folder", path.parent))
    }
    engine.write("start", pid=os.getpid(), path=str(path), **modes)

    def load(start: Start) -> tuple[ScriptedEngine, Ready]:
        if start.device == "slow":
            time.sleep(1000)
        if start.device == "broken":
            raise UsageError("device 'broken' does not exist")
        pooling = Pooling(kind="embedding", dim=2, max_tokens=64) if start.device == "pooling" else None
        ready = Ready(
            folder=start.checkpoint,
            vocab_size=300,
            context_len=4096,
            device="cpu",
            dtype="float32",
            generates=pooling is None,
            pooling=pooling,
        )
        return engine, ready

    return work(connect(str(path)), load)


if __name__ == "__main__":
    sys.exit(main())
