"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from trine.engine.errors import UsageError
from trine.engine.generate.logprobs import TokenLogprobs
from trine.engine.generate.request import FinishReason
from trine.engine.generate.sampling import SamplingParams

if TYPE_CHECKING:
    from trine.engine.generate.grammar import Grammar


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How an engine runs. Raises `UsageError` for impossible values, by name.

    Attributes:
        block_size: tokens of a cache block: 16, 32, 64, 128 or 256.
        max_batch_tokens: tokens of one step, prefill and decoding together.
        max_running: completions computed in turns; each holds its blocks.
        max_waiting: completions in the queue; more are refused.
        longest: tokens that a prompt and its completion will have together, at most; 0: as many as the model's context.
            The cache gets no more room than `max_running` of these need. A longer one is refused where it finds none.
        kv_bytes: size of the key/value cache; 0 takes it from what is free.
        kv_dtype: of keys and values; torch.int8, or torch.float8_e4m3fn on a GPU, takes half or a quarter of the room,
            at some loss. None: as the checkpoint asks, else the compute dtype.
        compute_dtype: of the activations; None takes the dtype of the parameters.
        prefix_caching: find computed blocks again for prompts that begin alike (under the same salt).
        decode_steps: compute steps that only decode by captured graphs on a GPU, by compiled loops on a CPU where the
            model's shape is known to them and they were seen to give the same logits.
        deterministic: what a request gets does not depend on what runs beside it, on how its prompt is cut, on
            preemption or on cached blocks, to the last bit, and log-probabilities are those of `Transformer.forward`
            with `deterministic=True` in the same dtype. Slower; refused where this machine does not keep the bits.
        overlap: decide and prepare the next step while the device computes this one, whose tokens are read after that;
            outputs are the same and come a step later. None: on a GPU. Steps with requests that need to know their last
            token (penalties, grammar, log-probabilities, guesses) wait for it.
        speculate: tokens that are guessed (by `lookup.py`, or by a draft model where the engine has one) and verified
            together in a step; 0 is off. What is generated stays the same, or where a draft model meets a request that
            draws without a seed, its distribution does.
        speculate_max_running: no guesses where more completions are under way, or any wait: then they cost others time.
    """

    block_size: int = 16
    max_batch_tokens: int = 2048
    max_running: int = 64
    max_waiting: int = 1024
    longest: int = 0
    kv_bytes: int = 0
    kv_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    prefix_caching: bool = True
    decode_steps: bool = True
    deterministic: bool = False
    overlap: bool | None = None
    speculate: int = 0
    speculate_max_running: int = 4

    def __post_init__(self) -> None:
        if self.block_size not in (16, 32, 64, 128, 256):
            raise UsageError(f"block_size = {self.block_size}; it must be 16, 32, 64, 128 or 256")
        if self.kv_bytes < 0:
            raise UsageError(f"kv_bytes = {self.kv_bytes}; give a number of bytes, or 0 to choose from what is free")
        for name in ("longest", "speculate", "speculate_max_running"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} = {getattr(self, name)}; it must be 0 or more")
        known = (None, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
        if self.kv_dtype not in known:
            raise UsageError(f"kv_dtype = {self.kv_dtype}; use None (as computed), torch.int8 or torch.float8_e4m3fn")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One request: `params.n` completions of one prompt.

    Attributes:
        id: unique among those in the engine.
        prompt_ids: at least one.
        priority: lower goes first.
        salt: requests share cached prefixes only under the same salt (one for each tenant).
        grammar: what the text must match.
        adapter: the name of the LoRA adapter to compute it with (`Engine.load_adapter`); None for the model alone.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    salt: str = ""
    grammar: Grammar | None = None
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingRequest:
    """One request for a vector of each of several inputs: their embeddings, or the logits of their classes.

    Attributes:
        id: unique among those in the engine.
        inputs: ids of each, at least one; special tokens included.
        token_types: 0 or 1 for each id (the text of a pair that it belongs to); None is 0 for all.
        priority: lower goes first.
    """

    id: str
    inputs: tuple[tuple[int, ...], ...]
    token_types: tuple[tuple[int, ...], ...] | None = None
    priority: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What a step added to one completion, or the vector of one input.

    Attributes:
        choice: number of the completion, or of the input.
        text: new text; joined over the outputs of a choice, its whole text.
        token_ids: new ids, the one that ended the text included.
        logprobs: of each new id, where asked for.
        finish_reason: "stop", "length" or "error" in the last output of a choice, None before.
        stop_reason: the stop id or string that ended the text, if one did.
        prompt_tokens, completion_tokens: of this choice so far.
        cached_tokens: tokens of the prompt that were found in the cache.
        prompt_logprobs: of each id of the prompt (None for the first), once, in the first output of a choice.
        error: why the choice failed; it ended then, and no other did.
        vector: float32 [D], of an input of a pooling request; its only output.
    """

    request_id: str
    choice: int
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None
    vector: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Where an engine stands, and its totals since it started.

    Attributes:
        waiting, running: completions and inputs in the queue, and completions computed in turns.
        kv_blocks_used, kv_blocks_total: blocks that somebody holds, and all; of `block_size` tokens each.
        kv_bytes: size of the cache.
        prefix_query_tokens, prefix_hit_tokens: prompt tokens of admitted completions, and those found in the cache.
        preemptions: times a completion lost its blocks to others.
        steps, step_seconds: steps with work, and the time they took.
        schedule_seconds: the part of it that was spent on deciding what to compute.
        prompt_tokens, generated_tokens: tokens of prompts that were computed, and tokens chosen.
        drafted_tokens, accepted_tokens: guessed tokens that were verified, and those that stood.
    """

    waiting: int
    running: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_bytes: int
    block_size: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    steps: int
    step_seconds: float
    schedule_seconds: float
    prompt_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
