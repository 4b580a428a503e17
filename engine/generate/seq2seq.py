"""Sources in, targets out: generating with an encoder-decoder, one fixed batch at a time.

The prompt of an encoder-decoder is its source. The encoder reads all sources of a batch at once; then every row takes
one id a step, greedily, by the sampler, or by beam search. Rows that have finished leave the batch. Greedy and beam
search give the ids of transformers' `generate`.

Shapes: N rows (targets in flight), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from trine.engine.errors import ContextLengthError, UsageError
from trine.engine.generate.beam import BeamParams, beam_search
from trine.engine.generate.constraints import Constraints
from trine.engine.generate.request import Request
from trine.engine.generate.sampling import SamplingParams, check_ids
from trine.engine.generate.targets import Targets
from trine.engine.model.config import ModelConfig
from trine.engine.model.transformer import Transformer
from trine.engine.text.prompt import encode_source
from trine.engine.text.tokenizer import Tokenizer

OnText = Callable[[int, int, str], None]


def make_requests(
    model: Transformer,
    tokenizer: Tokenizer,
    sources: Sequence[str | Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    eos_ids: frozenset[int],
) -> list[Request]:
    """All requests, checked before anything is computed; as `plain.generate` says, with sources for prompts.

    Raises `ContextLengthError` for a source that is longer than the model's positions.
    """
    constraints_of(model.config).check(model.config.vocab_size)
    requests = []
    start = start_id(model.config)
    for index, (source, wanted) in enumerate(zip(sources, params, strict=True)):
        check_ids(wanted, tokenizer.vocab_size)
        ids = encode_source(tokenizer, source, end_of_source(model.config, tokenizer))
        check_source(model.config, ids, f"source {index + 1}", tokenizer.vocab_size)
        if wanted.prompt_logprobs is not None:
            raise UsageError("prompt_logprobs are not known of a source: an encoder predicts nothing; leave them out")
        requests += [
            Request(
                ids,
                wanted,
                tokenizer=tokenizer,
                budget=target_budget(model.config, wanted.max_tokens),
                eos_ids=eos_ids,
                prompt_index=index,
                choice=choice,
                device=model.device,
                begin_ids=(start,) if start < tokenizer.vocab_size else (),
            )
            for choice in range(wanted.n)
        ]
    return requests


def run_batch(
    model: Transformer,
    requests: Sequence[Request],
    on_text: OnText | None,
    compute_dtype: torch.dtype,
    *,
    beams: BeamParams | None = None,
    constraints: Constraints | None = None,
) -> None:
    """Finish all requests. `beams`: by beam search; temperature and filters mean nothing then, `max_tokens`,
    `min_tokens` and the ids that end a text must be alike. `constraints`: default those of the model.
    """
    rules = constraints_of(model.config) if constraints is None else constraints
    if beams is not None:
        _search(model, requests, beams, rules, on_text, compute_dtype)
        return
    max_tokens = max(request.budget for request in requests)
    targets = Targets(
        model, [request.prompt_ids for request in requests], max_tokens=max_tokens, compute_dtype=compute_dtype
    )
    start, active = start_id(model.config), list(requests)
    while active:
        ids_N = torch.tensor([request.token_ids[-1] if request.token_ids else start for request in active])
        logits_NV = targets.logits(ids_N)
        for row, request in enumerate(active):
            text = _advance(request, logits_NV[row], start, rules)
            if text and on_text is not None:
                on_text(request.prompt_index, request.choice, text)
        goes_on = [row for row, request in enumerate(active) if request.finish_reason is None]
        if goes_on and len(goes_on) < len(active):
            targets.keep(torch.tensor(goes_on, device=model.device))
        active = [active[row] for row in goes_on]


def greedy_ids(
    model: Transformer, sources: Sequence[Sequence[int]], *, max_tokens: int, compute_dtype: torch.dtype | None = None
) -> list[list[int]]:
    """The likeliest ids after each source, up to the one that ends a target, which is left out: without a tokenizer."""
    config, start = model.config, start_id(model.config)
    rules, budget = constraints_of(config), target_budget(config, max_tokens)
    found: list[list[int]] = [[] for _ in sources]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        targets = Targets(model, sources, max_tokens=budget, compute_dtype=compute_dtype)
        active, ids_N = list(range(len(sources))), torch.full((len(sources),), start)
        for length in range(1, budget + 1):
            begun = [[start, *found[index]] for index in active]
            scores_NV = rules.apply(targets.logits(ids_N), begun, last=length == budget)
            chosen = scores_NV.argmax(dim=-1).tolist()
            goes_on = [row for row, token in enumerate(chosen) if token not in config.eos_token_ids]
            if not goes_on:
                break
            for row in goes_on:
                found[active[row]].append(chosen[row])
            if len(goes_on) < len(active):
                targets.keep(torch.tensor(goes_on, device=model.device))
            active, ids_N = [active[row] for row in goes_on], torch.tensor([chosen[row] for row in goes_on])
    model.train(was_training)
    return found


def constraints_of(config: ModelConfig, *, no_repeat: int = 0) -> Constraints:
    """What the checkpoint rules out, and runs of `no_repeat` ids that occur twice."""
    return Constraints(banned_ids=config.banned_token_ids, last_id=config.forced_last_token_id, no_repeat=no_repeat)


def start_id(config: ModelConfig) -> int:
    """What every target begins with."""
    assert config.decoder_start_token_id is not None
    return config.decoder_start_token_id


def target_budget(config: ModelConfig, max_tokens: int) -> int:
    """New ids of a target, at most: relative positions have no end, others bound what is fed, the first id with it."""
    return max_tokens if config.positions == "relative" else min(max_tokens, config.max_positions)


def end_of_source(config: ModelConfig, tokenizer: Tokenizer) -> int | None:
    """The id that ends a source: the model's, or else the tokenizer's."""
    return config.eos_token_ids[0] if config.eos_token_ids else tokenizer.eos_id


def check_source(config: ModelConfig, ids: Sequence[int], what: str, vocab_size: int) -> None:
    """Raises `UsageError` for an id that does not exist, `ContextLengthError` for more ids than the model reads."""
    wrong = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if wrong:
        raise UsageError(f"{what} holds id {wrong[0]}; the vocabulary ends at {vocab_size - 1}")
    longest = config.max_positions
    if config.positions != "relative" and len(ids) > longest:
        raise ContextLengthError(
            f"{what} has {len(ids)} tokens but the model reads {longest} at most; shorten it or split it up"
        )


def _advance(request: Request, logits_V: torch.Tensor, start: int, rules: Constraints) -> str:
    last = len(request.token_ids) + 1 == request.budget
    if last and rules.last_id is not None:
        # Whatever min_tokens says, as in transformers.
        return request.take(rules.last_id, logits_V)
    ruled_V = rules.apply(logits_V[None], [[start, *request.token_ids]], last=False)[0]
    return request.advance(logits_V, ruled_V)


def _search(
    model: Transformer,
    requests: Sequence[Request],
    beams: BeamParams,
    rules: Constraints,
    on_text: OnText | None,
    compute_dtype: torch.dtype,
) -> None:
    first = requests[0]
    targets = Targets(
        model,
        [request.prompt_ids for request in requests],
        num_rows=beams.num_beams,
        max_tokens=first.budget,
        compute_dtype=compute_dtype,
    )
    found = beam_search(
        targets,
        beams,
        start_id=start_id(model.config),
        ends=first.ends,
        max_tokens=first.budget,
        min_tokens=first.params.min_tokens,
        constraints=replace(rules, banned_ids=(*rules.banned_ids, *first.params.banned_ids)),
        vocab_size=first.vocab_size,
    )
    for request, hypotheses in zip(requests, found, strict=True):
        text = "".join(_accepted(request, hypotheses[request.choice].ids))
        if text and on_text is not None:
            on_text(request.prompt_index, request.choice, text)


def _accepted(request: Request, ids: Sequence[int]) -> Iterator[str]:
    for token_id in ids:
        if request.finish_reason is None:  # a stop string ends it before
            yield request.accept(token_id)
