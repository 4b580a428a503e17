"""Perplexity of a model on texts: how well it predicts each token from the tokens before it.

    loss = -(1/N) sum log p(token_i | tokens before it inside its window)          nats per token
    perplexity = exp(loss)              bits per byte = N * loss / ln 2 / (UTF-8 bytes of the texts)

A text longer than the window is read in windows that start `stride` tokens apart; each window scores only the tokens
that the one before did not reach, so every scored token has at least `window - stride` tokens of context after the
first window. This is the sliding window of the transformers documentation ("Perplexity of fixed-length models"). With
stride = window the windows are disjoint and the first token of each has no context and is not scored.

Each text stands alone: no window crosses from one to the next. The first token of a text is scored only where a
beginning-of-text token stands before it; bytes count the whole text all the same, so many very short texts without
such a token look better in bits per byte than they are. `tokens` says how many tokens were scored.

Perplexity compares models that share a tokenizer; bits per byte compares any two. Sums are in float64.

Shapes: B windows, T tokens of a window, C width, N scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trine.engine.errors import ContextLengthError, DataError, NonFiniteError, UsageError
from trine.engine.log import counted
from trine.engine.model.transformer import Transformer
from trine.engine.text.prompt import refuse_one_text
from trine.engine.text.tokenizer import Tokenizer
from trine.kernels.cross_entropy.token_log_probs import token_log_probs

# Tokens in one forward pass: enough rows for fast products, few enough for a laptop's memory.
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass over `ids`; the last `num_scored` of them are scored (never the first)."""

    ids: Sequence[int]
    num_scored: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """What was measured, and how.

    Attributes:
        loss: nats per scored token. perplexity: exp(loss). bits_per_byte: see the module.
        tokens: scored tokens. unknown_tokens: tokens that stand for characters the tokenizer does not know.
        bytes: UTF-8 bytes of all texts. texts: their number.
        window, stride: in tokens. bos: whether a beginning-of-text token was put before each text.
        tokenizer: fingerprint of the tokenizer.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    unknown_tokens: int
    bytes: int
    texts: int
    window: int
    stride: int
    bos: bool
    tokenizer: str


class Progress(Protocol):
    """Shows a sequence being worked through, as `trine.engine.log.progress` does."""

    def __call__(self, items: Iterable[list[Window]], *, total: int, what: str) -> Iterable[list[Window]]: ...


def perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity and bits per byte of `texts`; see the module for the convention.

    Args:
        model: on any device. Its training mode is off meanwhile and restored.
        tokenizer: the model's. Special tokens written in the texts are read as plain text.
        texts: each a document of its own.
        window: tokens a prediction may look at, its own included; default the model's context.
        stride: tokens from one window to the next; default half the window.
        bos: put the beginning-of-text token before each text; default: where the tokenizer itself does so.
        compute_dtype: default the dtype of the parameters.
        progress: shown over the batches.

    Raises:
        ContextLengthError: the window is longer than the model's context.
        UsageError: one text that is not in a list, an impossible window or stride, `bos` where the tokenizer names no
            such token, or a model that does not predict the next token.
        DataError: nothing to score.
        NonFiniteError: the loss is not a number.
    """
    refuse_one_text("texts", texts)
    if not model.config.causal or model.head is not None:
        raise UsageError("this model is an encoder and predicts no next token; it has no perplexity")
    if model.encoder is not None:
        raise UsageError("this model predicts the targets of sources and no text alone; it has no perplexity")
    window = model.config.max_positions if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    _check_sizes(model, tokenizer, window, stride)
    bos_id = _choose_bos(tokenizer, bos)
    windows = []
    unknown_tokens = 0
    for ids in tokenizer.encode_batch(texts, parse_special=False):
        unknown_tokens += 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
        windows += sliding_windows(ids if bos_id is None else [bos_id, *ids], window, stride)
    tokens = sum(one.num_scored for one in windows)
    num_bytes = sum(len(text.encode()) for text in texts)
    if tokens == 0:
        raise DataError(
            f"nothing to score: {num_bytes} bytes in {counted(len(texts), 'text')} leave no token with a context"
        )
    batches = make_batches(windows, TOKENS_PER_BATCH)
    shown: Iterable[list[Window]] = batches
    if progress is not None:
        shown = progress(batches, total=len(batches), what="evaluating")
    was_training = model.training
    model.eval()
    try:
        nats = math.fsum(_batch_nats(model, batch, compute_dtype) for batch in shown)
    finally:
        model.train(was_training)
    if not math.isfinite(nats):
        raise NonFiniteError(f"the loss is {nats}; the weights are damaged, or try --dtype float32")
    loss = nats / tokens
    return PerplexityResult(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / num_bytes,
        tokens=tokens,
        unknown_tokens=unknown_tokens,
        bytes=num_bytes,
        texts=len(texts),
        window=window,
        stride=stride,
        bos=bos_id is not None,
        tokenizer=tokenizer.fingerprint,
    )


def sliding_windows(ids: Sequence[int], window: int, stride: int) -> list[Window]:
    """The windows of one text, each with how many of its last tokens it scores; none that scores nothing."""
    windows = []
    scored_until = 1  # the first token has nothing to be predicted from
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        # A window's first token has no context in it, which matters only where windows do not overlap.
        first = max(scored_until, start + 1)
        if stop > first:
            windows.append(Window(ids[start:stop], stop - first))
        scored_until = stop
        if stop == len(ids):
            break
    return windows


def make_batches(windows: Sequence[Window], tokens_per_batch: int) -> list[list[Window]]:
    """Group windows of one length, in order of length, so that no batch holds padding."""
    batches: list[list[Window]] = []
    for one in sorted(windows, key=lambda one: len(one.ids), reverse=True):
        length = len(one.ids)
        fits = batches and len(batches[-1][0].ids) == length and (len(batches[-1]) + 1) * length <= tokens_per_batch
        if fits:
            batches[-1].append(one)
        else:
            batches.append([one])
    return batches


@torch.inference_mode()
def _batch_nats(model: Transformer, batch: Sequence[Window], compute_dtype: torch.dtype | None) -> float:
    """Sum of -log p over the scored tokens of windows of one length."""
    ids_BT = torch.tensor([one.ids for one in batch], device=model.device)
    hidden_BTC = model(ids_BT[:, :-1], compute_dtype=compute_dtype)
    scored_B1 = torch.tensor([[one.num_scored] for one in batch], device=model.device)
    num_targets = ids_BT.shape[1] - 1
    scored_BT = torch.arange(num_targets, device=model.device) >= num_targets - scored_B1
    log_probs_N = token_log_probs(
        hidden_BTC[scored_BT],
        model.head_weight,
        ids_BT[:, 1:][scored_BT],
        bias=model.head_bias,
        softcap=model.config.logit_softcap,
    )
    return -log_probs_N.double().sum().item()


def _check_sizes(model: Transformer, tokenizer: Tokenizer, window: int, stride: int) -> None:
    context = model.config.longest_sequence
    if window < 2:
        raise UsageError(f"window must be at least 2 tokens, one to predict from and one to predict; got {window}")
    if window > context:
        raise ContextLengthError(f"window {window} is longer than the model's context of {context}; shorten it")
    if not 1 <= stride <= window:
        raise UsageError(
            f"stride must be from 1 to the window ({window}), so that no token is passed over; got {stride}"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.config.vocab_size}; "
            "they do not belong together"
        )


def _choose_bos(tokenizer: Tokenizer, wanted: bool | None) -> int | None:
    """The id to put before each text, or None."""
    bos_id = tokenizer.bos_id
    if wanted is None:
        adds = tokenizer.encode("", add_special_tokens=True)
        return bos_id if bos_id is not None and bos_id in adds[:1] else None
    if wanted and bos_id is None:
        raise UsageError("bos was asked for but the tokenizer names no beginning-of-text token; leave it out")
    return bos_id if wanted else None
