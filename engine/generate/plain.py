"""The plain generator: prompts in, completions out, one fixed batch at a time.

Every prompt of a batch is padded on the right to the longest, one forward pass fills the key/value cache, and then all
rows take one token per step until the last has finished. It schedules nothing and shares nothing, so it is easy to
trust: it is the oracle of every quicker engine. Greedy output equals transformers' `generate` token by token. The
prompts of an encoder-decoder are its sources (`seq2seq.py`).

Shapes: B rows (completions in flight), T prompt tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trine.engine.errors import ContextLengthError, UsageError
from trine.engine.generate import seq2seq
from trine.engine.generate.beam import BeamParams
from trine.engine.generate.logprobs import prompt_logprobs
from trine.engine.generate.request import Completion, Request
from trine.engine.generate.sampling import SamplingParams, check_ids
from trine.engine.model.cache import KVCache
from trine.engine.model.transformer import Transformer
from trine.engine.text.prompt import encode_prompt, refuse_one_text
from trine.engine.text.tokenizer import Tokenizer

OnText = Callable[[int, int, str], None]


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    on_text: OnText | None = None,
    compute_dtype: torch.dtype | None = None,
    batch_size: int = 8,
    beams: BeamParams | None = None,
    no_repeat: int = 0,
) -> list[Completion]:
    """Complete each prompt; returns the completions in the order of the prompts, the choices of each together.

    Args:
        model: on any device, in any dtype. Its training mode is off meanwhile and restored.
        tokenizer: the model's.
        prompts: texts (special tokens are added as the tokenizer says, such as a beginning-of-text token) or ids, taken
            as they are. An empty prompt starts from the beginning-of-text token, or else the end-of-text token, which
            stands between documents.
        params: for all prompts, or one for each.
        on_text: called with (prompt index, choice, text) for every piece of text as it comes.
        compute_dtype: default the dtype of the parameters.
        batch_size: completions computed at once.
        beams: of an encoder-decoder, beam search in the place of sampling.
        no_repeat: of an encoder-decoder, the length of runs of ids that no text may hold twice; 0 is off.

    Raises:
        ContextLengthError: a prompt leaves no room for a new token in the model's context.
        UsageError: one text that is not in a list, an id outside the vocabulary, an empty prompt without any token to
            start from, an encoder.
        NonFiniteError: the model's logits are not numbers.
    """
    check_completes(model)
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    if model.config.encoder is None and (beams is not None or no_repeat):
        raise UsageError("beams and no_repeat are known to encoder-decoders only; this model has a decoder alone")
    requests = _make_requests(model, tokenizer, prompts, params)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(requests), batch_size):
                batch, dtype = requests[start : start + batch_size], compute_dtype or model.dtype
                if model.config.encoder is None:
                    _run_batch(model, batch, on_text, dtype)
                else:
                    rules = seq2seq.constraints_of(model.config, no_repeat=no_repeat)
                    seq2seq.run_batch(model, batch, on_text, dtype, beams=beams, constraints=rules)
    finally:
        model.train(was_training)
    return [request.completion() for request in requests]


def check_completes(model: Transformer) -> None:
    """Raises `UsageError` where the model is an encoder."""
    if model.head is not None:
        raise UsageError("this model gives vectors and completes no text; see trine embed and trine classify")


def end_ids(model: Transformer, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text: the model's, or the tokenizer's where the model names none.

    Raises `UsageError` where the tokenizer has more ids than the model.
    """
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {config.vocab_size}; "
            "they do not belong together"
        )
    if config.eos_token_ids:
        return frozenset(config.eos_token_ids)
    return frozenset() if tokenizer.eos_id is None else frozenset((tokenizer.eos_id,))


def _make_requests(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
) -> list[Request]:
    """All requests, checked before anything is computed."""
    refuse_one_text("prompts", prompts)
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UsageError(
            f"{len(each)} sampling parameters for {len(prompts)} prompts; give one for each or one for all"
        )
    eos_ids = end_ids(model, tokenizer)
    if model.config.encoder is not None:
        return seq2seq.make_requests(model, tokenizer, prompts, each, eos_ids=eos_ids)
    longest = model.config.max_positions
    requests = []
    for index, (prompt, wanted) in enumerate(zip(prompts, each, strict=True)):
        check_ids(wanted, tokenizer.vocab_size)
        ids = encode_prompt(tokenizer, prompt)
        wrong = [token_id for token_id in ids if not 0 <= token_id < tokenizer.vocab_size]
        if wrong:
            raise UsageError(
                f"prompt {index + 1} holds id {wrong[0]}; the vocabulary ends at {tokenizer.vocab_size - 1}"
            )
        room = longest - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"prompt {index + 1} has {len(ids)} tokens but the model's context holds {longest}, the new tokens "
                f"included; shorten it to {longest - 1} tokens or fewer"
            )
        requests += [
            Request(
                ids,
                wanted,
                tokenizer=tokenizer,
                budget=min(wanted.max_tokens, room),
                eos_ids=eos_ids,
                prompt_index=index,
                choice=choice,
                device=model.device,
            )
            for choice in range(wanted.n)
        ]
    return requests


def _run_batch(
    model: Transformer, requests: Sequence[Request], on_text: OnText | None, compute_dtype: torch.dtype
) -> None:
    """Prefill all rows together, then decode until every row has finished."""
    B = len(requests)
    lengths = [len(request.prompt_ids) for request in requests]
    # The last token is never fed, so its key and value need no slot.
    num_slots = max(length + request.budget - 1 for length, request in zip(lengths, requests, strict=True))
    cache, hidden_BTC = _prefill(model, [request.prompt_ids for request in requests], num_slots, compute_dtype)
    for row, request in enumerate(requests):
        _add_prompt_logprobs(model, request, hidden_BTC[row])
    hidden_BC = hidden_BTC[torch.arange(B), torch.tensor(lengths) - 1]
    while True:
        logits_BV = model.logits(hidden_BC)
        for request, logits_V in zip(requests, logits_BV, strict=True):
            if request.finish_reason is None:
                text = request.advance(logits_V)
                if text and on_text is not None:
                    on_text(request.prompt_index, request.choice, text)
        if all(request.finish_reason is not None for request in requests):
            return
        # A finished row feeds its last token again, at its own last position (or the last slot): nobody reads it.
        ids_B1 = torch.tensor([[request.last_id] for request in requests])
        positions_B1 = torch.tensor([[min(request.last_position, num_slots - 1)] for request in requests])
        if _switches(model.config.rope_switch, positions_B1[:, 0], cache):
            ends = (positions_B1[:, 0] + 1).tolist()
            texts = [[*one.prompt_ids, *one.token_ids][:end] for one, end in zip(requests, ends, strict=True)]
            cache, hidden_BTC = _prefill(model, texts, num_slots, compute_dtype)
            hidden_BC = hidden_BTC[torch.arange(B), positions_B1[:, 0]]
            continue
        hidden_B1C = model(ids_B1.to(model.device), positions_BT=positions_B1, cache=cache, compute_dtype=compute_dtype)
        hidden_BC = hidden_B1C[:, 0]


def _switches(switch: int | None, positions_B: Tensor, cache: KVCache) -> bool:
    """Whether a text grows to where longrope turns all of its tokens otherwise, so that it is computed anew."""
    if switch is None or cache.longer_B is None:
        return False
    return not torch.equal(positions_B >= switch, cache.longer_B.cpu())


def _prefill(
    model: Transformer, texts: Sequence[Sequence[int]], num_slots: int, compute_dtype: torch.dtype
) -> tuple[KVCache, Tensor]:
    """A cache that holds all texts, and their hidden states, padded on the right."""
    lengths = torch.tensor([len(ids) for ids in texts])
    ids_BT = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(texts):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    cache = KVCache(model.config, len(texts), num_slots, model.device, compute_dtype)
    hidden_BTC = model(ids_BT.to(model.device), cache=cache, lengths_B=lengths, compute_dtype=compute_dtype)
    return cache, hidden_BTC


def _add_prompt_logprobs(model: Transformer, request: Request, hidden_TC: Tensor) -> None:
    """Where the request asks for them; hidden states of the padded prompt."""
    count, ids = request.params.prompt_logprobs, request.prompt_ids
    if count is not None:
        of_rest = prompt_logprobs(model, hidden_TC, ids[1:], count, vocab_size=request.vocab_size)
        request.prompt_logprobs = (None, *of_rest)
