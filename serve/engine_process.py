"""The engine process: `python -m trine.serve.engine_process SOCKET`, started by the API process and by nobody else.

It loads what `Start` names and lends the batching engine to the loop in `trine.serve.worker`, messages turned into the
engine's own types and back.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from trine.engine.env import set_threads
from trine.engine.errors import UsageError
from trine.engine.generate.engine import Engine
from trine.engine.generate.grammar import Grammar
from trine.engine.generate.load import load_draft, load_for_inference
from trine.engine.generate.logprobs import TokenLogprobs
from trine.engine.generate.pooling_info import describe
from trine.engine.generate.records import EngineConfig, GenerationRequest, Output, PoolingRequest
from trine.engine.generate.sampling import SamplingParams
from trine.engine.generate.seq2seq import end_of_source
from trine.engine.log import format_duration, say
from trine.engine.model.checkpoint import resolve_checkpoint
from trine.serve.messages import Delta, Logprob, Pool, Pooling, Ready, Sampling, Start, Stats, Submit
from trine.serve.worker import connect, work

# Of stored keys and values; None stores them as they are computed.
KV_DTYPES = {None: None, "int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
AS_COMPUTED = "as-computed"


class RealEngine:
    """`trine.engine.generate.engine.Engine`, in messages."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._folder = engine, folder

    def add(self, request: Submit | Pool) -> None:
        """As `Engine.add`."""
        if isinstance(request, Pool):
            self._engine.add(to_pooling_request(request))
            return
        self._engine.add(
            GenerationRequest(
                id=request.id,
                prompt_ids=tuple(request.prompt_ids),
                params=to_params(request.sampling),
                priority=request.priority,
                salt=request.salt,
                grammar=None if request.guide is None else Grammar(request.guide.kind, request.guide.source),
                adapter=request.adapter,
            )
        )

    def abort(self, request_id: str) -> None:
        """As `Engine.abort`."""
        self._engine.abort(request_id)

    def step(self) -> list[Delta]:
        """As `Engine.step`."""
        return [_to_delta(output) for output in self._engine.step()]

    @property
    def has_work(self) -> bool:
        """As `Engine.has_work`."""
        return self._engine.has_work

    def stats(self) -> Stats:
        """What the metrics show of `Engine.stats`."""
        stats = self._engine.stats()
        return Stats(**{name: getattr(stats, name) for name in Stats.__struct_fields__})

    def load_adapter(self, name: str, folder: str) -> None:
        """As `Engine.load_adapter`."""
        self._engine.load_adapter(name, folder, base=self._folder)

    def unload_adapter(self, name: str) -> None:
        """As `Engine.unload_adapter`."""
        self._engine.unload_adapter(name)
        say(f"adapter {name!r} is unloaded")


def to_params(sampling: Sampling) -> SamplingParams:
    """The engine's own type; it has the same fields."""
    return SamplingParams(**{name: getattr(sampling, name) for name in Sampling.__struct_fields__})


def to_pooling_request(pool: Pool) -> PoolingRequest:
    """The engine's own type."""
    types = pool.token_types
    return PoolingRequest(
        id=pool.id,
        inputs=tuple(tuple(ids) for ids in pool.inputs),
        token_types=None if types is None else tuple(tuple(each) for each in types),
        priority=pool.priority,
    )


def load(start: Start) -> tuple[RealEngine, Ready]:
    """The model on its device and the engine around it."""
    set_threads(start.threads)
    folder = resolve_checkpoint(Path(start.checkpoint))
    model, tokenizer = load_for_inference(folder, dtype=start.dtype, device=start.device)
    given = {name: getattr(start, name) for name in ("max_running", "max_waiting", "max_batch_tokens", "block_size")}
    kv_dtypes = {**KV_DTYPES, AS_COMPUTED: model.dtype}
    if start.kv_dtype not in kv_dtypes:
        raise UsageError(f"kv-dtype {start.kv_dtype!r} is not known; give {' or '.join(filter(None, kv_dtypes))}")
    config = EngineConfig(
        kv_bytes=start.kv_bytes,
        kv_dtype=kv_dtypes[start.kv_dtype],
        prefix_caching=start.prefix_caching,
        deterministic=start.deterministic,
        speculate=start.speculate,
        **{name: value for name, value in given.items() if value is not None},
    )
    draft = None
    if start.draft is not None:
        draft = load_draft(Path(start.draft), model, tokenizer, dtype=start.dtype)
    engine = Engine(model, tokenizer, config, draft=draft)
    lent = RealEngine(engine, folder)
    for name, adapter in start.adapters:
        lent.load_adapter(name, adapter)
    engine.prepare()
    pooling = describe(model, folder)
    # On a GPU a long prompt costs nothing, and goes through kernels that a short one does not need.
    longest = 40 if model.device.type == "cpu" else config.max_batch_tokens - 3
    _warm_up(engine, model.config.max_positions, longest, pools=pooling is not None)
    stats, context_len = engine.stats(), model.config.max_positions
    if engine.generates:
        context_len = min(context_len, stats.kv_blocks_total * stats.block_size)
    elif pooling is not None:
        context_len = pooling.max_tokens
    ready = Ready(
        folder=str(folder),
        vocab_size=tokenizer.vocab_size,
        context_len=context_len,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        generates=engine.generates,
        pooling=None if pooling is None else Pooling(**asdict(pooling)),
        source_len=engine.longest_source,
        source_end=None if model.config.encoder is None else end_of_source(model.config, tokenizer),
    )
    return lent, ready


def _warm_up(engine: Engine, context_len: int, longest: int, *, pools: bool) -> None:
    """A few tokens, alone and side by side: what is compiled or allocated at first use is so before anybody waits."""
    began = time.monotonic()
    if pools:
        engine.add(PoolingRequest(id="warm-up", inputs=((0,), (0,) * min(3, context_len))))
        while engine.has_work:
            engine.step()
    new_tokens = min(3, context_len - 1)
    # Alone, a few, and as many as there will ever be: each goes another way through the kernels.
    for n in sorted({1, 3, engine.config.max_running}) if engine.generates else ():
        params = SamplingParams(max_tokens=new_tokens, n=n, seed=0, ignore_eos=True)
        engine.add(GenerationRequest(id="warm-up", prompt_ids=(0,), params=params, salt="warm-up"))
        while engine.has_work:
            engine.step()
    # Prompts of some length, by themselves and beside another, with what is counted of a text.
    length = max(1, min(longest, context_len - 1, engine.longest_source or context_len))
    for together in (1, 2) if engine.generates else ():
        for number in range(together):
            params = SamplingParams(max_tokens=1, seed=0, repetition_penalty=1.1, ignore_eos=True)
            name = f"warm-up {together}/{number}"
            engine.add(GenerationRequest(id=name, prompt_ids=(0,) * length, params=params, salt=name))
        while engine.has_work:
            engine.step()
    say(f"warmed up in {format_duration(time.monotonic() - began)}")


def _to_delta(output: Output) -> Delta:
    return Delta(
        id=output.request_id,
        choice=output.choice,
        text=output.text,
        token_ids=list(output.token_ids),
        logprobs=[_to_logprob(entry) for entry in output.logprobs],
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        prompt_tokens=output.prompt_tokens,
        completion_tokens=output.completion_tokens,
        cached_tokens=output.cached_tokens,
        prompt_logprobs=None
        if output.prompt_logprobs is None
        else [None if entry is None else _to_logprob(entry) for entry in output.prompt_logprobs],
        error=output.error,
        vector=None if output.vector is None else output.vector.astype("<f4").tobytes(),
    )


def _to_logprob(entry: TokenLogprobs) -> Logprob:
    return Logprob(entry.id, entry.logprob, entry.rank, list(entry.top))


def main() -> int:
    """Serve the API process until it stops us or goes away."""
    return work(connect(sys.argv[1]), load)


if __name__ == "__main__":
    sys.exit(main())
