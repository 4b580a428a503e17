"""How one token is chosen from the logits of one position.

Order of operations, the same as transformers' (4.57 and 5.x), on fp32 logits:

    1. repetition penalty      l > 0: l / penalty, l < 0: l * penalty, for every id in the prompt or the output
    2. presence, frequency     l - presence * (count > 0) - frequency * count, counts over the output only (OpenAI)
    3. bias                    l + bias of the id
    4. bans                    only allowed ids, no banned ones, no ending ids before min_tokens, what a grammar allows
    5. greedy (temperature 0)  argmax; the rest does not apply
    6. temperature             l / temperature
    7. top-k                   keep the k largest (and what ties with the k-th)
    8. top-p                   keep the smallest set of likeliest ids whose probability reaches p (Holtzman et al. 2019)
    9. min-p                   keep ids with at least min_p times the probability of the likeliest (Nguyen et al. 2024)
    10. draw                   one uniform number through the inverse of the cumulative distribution, in float64

A draw takes exactly one number from the request's own generator, whatever the vocabulary or the batch: a request with
a seed gives the same tokens alone and among others.

Shapes: V vocabulary. Everything works on one row, because each request has its own parameters.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trine.engine.errors import NonFiniteError, UsageError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What a request asks of the sampler; the defaults sample from the model's own distribution.

    Attributes:
        max_tokens: at most so many new tokens (1 or more).
        temperature: 0 is greedy; 1 is the model's distribution.
        top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
        repetition_penalty: 1 is off; above 1 makes ids of the prompt and the output less likely.
        presence_penalty, frequency_penalty: 0 is off, -2 to 2.
        seed: None takes a fresh one for each request.
        stop: the text ends before the first of these strings.
        stop_ids: the text ends at any of these ids, as at an end-of-sequence token.
        ignore_eos: go on after an end-of-sequence token.
        min_tokens: no end-of-sequence token and no stop id before so many tokens; stop strings are not looked for in
            their text.
        n: completions per prompt; choice 0 is what n=1 gives with the same seed.
        logit_bias: (id, number added to its logit) pairs.
        allowed_ids: nothing but these ids, where given. banned_ids: none of these.
        logprobs: None, or for each new token its log-probability under the model's own distribution (before any of the
            above) and that many of the likeliest ids with theirs. prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        UsageError: a value is out of its range; the message names it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    banned_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{field.name} must be a finite number, got {value}")
            if isinstance(value, str):  # a bare string for `stop` would pass for a tuple of its characters
                wanted = "a tuple of strings" if field.name == "stop" else f"no string: {field.type}"
                raise UsageError(f"{field.name} must be {wanted}, got the string {value!r}")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (off) to 1")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0; 1 is off")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "from -2 to 2")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "from -2 to 2")
        if self.seed is not None:
            _require(0 <= self.seed <= MAX_SEED, "seed", self.seed, "from 0 to 2^63 - 1")
        _require(all(self.stop), "stop", self.stop, "strings that are not empty")
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        if self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}; make it smaller")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _require(count is None or count >= 0, name, count, "None or 0 and more")
        for token_id, bias in self.logit_bias:
            _require(math.isfinite(bias), f"logit_bias of id {token_id}", bias, "a finite number; use banned_ids")
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise UsageError("logit_bias names an id twice; give each id one bias")
        if self.allowed_ids is not None and not set(self.allowed_ids) - set(self.banned_ids):
            raise UsageError("allowed_ids without banned_ids leaves no id to choose; allow at least one")
        if self.temperature == 0 and self.n > 1:
            raise UsageError(
                f"n = {self.n} with temperature 0 repeats one completion; set a temperature above 0 or n = 1"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def restricts(self) -> bool:
        """Whether ids are biased, banned or left out, whatever the text."""
        return bool(self.logit_bias or self.banned_ids or self.allowed_ids is not None)

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens so far in any way but through the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise `UsageError` for an id outside the vocabulary, or more log-probabilities than it has ids."""
    for name, ids in (
        ("stop_ids", params.stop_ids),
        ("logit_bias", tuple(token_id for token_id, _ in params.logit_bias)),
        ("allowed_ids", params.allowed_ids or ()),
        ("banned_ids", params.banned_ids),
    ):
        for token_id in ids:
            _require(0 <= token_id < vocab_size, f"an id of {name}", token_id, f"from 0 to {vocab_size - 1}")
    for name in ("logprobs", "prompt_logprobs"):
        _require((getattr(params, name) or 0) <= vocab_size, name, getattr(params, name), f"at most {vocab_size}")
    if len(set(params.banned_ids)) >= vocab_size:
        raise UsageError("banned_ids holds the whole vocabulary; leave at least one id")


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise UsageError(f"{name} must be {wanted}, got {value}")


def request_seed(params: SamplingParams, prompt_ids: Iterable[int], choice: int) -> int:
    """The seed of one completion: a hash of the given seed, the prompt and the choice, or a fresh one without a seed.

    It does not depend on the place of a prompt in its batch, and different prompts under one seed do not share their
    random numbers (a small model would give them much the same text).
    """
    if params.seed is None:
        return secrets.randbits(63)
    text = " ".join(map(str, (params.seed, choice, *prompt_ids)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & MAX_SEED


class Sampler:
    """Chooses the tokens of one completion: its parameters, its random generator, its counts for the penalties.

    Args:
        params: as validated.
        prompt_ids: ids that the repetition penalty counts as seen.
        vocab_size: V.
        seed: see `request_seed`.
        ends: ids that end the text; they are banned before `params.min_tokens`.
        device: where the logits will lie. The generator stays on the CPU, so a seed means the same everywhere.

    Attributes:
        counts: how often the output holds an id, 0 where only the prompt does; empty without penalties.
        num_chosen: tokens so far.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Iterable[int],
        vocab_size: int,
        seed: int,
        ends: frozenset[int] = frozenset(),
        device: torch.device | str = "cpu",
    ) -> None:
        self.params = params
        self.num_chosen = 0
        self.counts: dict[int, int] = {}
        self._ends = ends
        self._generator = torch.Generator().manual_seed(seed)
        self._seen_V: Tensor | None = None
        self._count_V: Tensor | None = None
        if params.repetition_penalty != 1:
            self.counts = dict.fromkeys(prompt_ids, 0)
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[list(self.counts)] = True
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            self._count_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self._bias_V: Tensor | None = None
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            self._bias_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)
            self._bias_V[list(ids)] = torch.tensor(biases, dtype=torch.float32, device=device)
        self._banned_V: Tensor | None = None
        if params.banned_ids or params.allowed_ids is not None:
            self._banned_V = torch.full((vocab_size,), params.allowed_ids is not None, device=device)
            self._banned_V[list(params.allowed_ids or ())] = False
            self._banned_V[list(params.banned_ids)] = True

    def next_token(self, logits_V: Tensor, allowed_V: Tensor | None = None) -> int:
        """Choose from fp32 logits [V] (left unchanged), among the ids that are true in `allowed_V`; count the choice.

        Raises `NonFiniteError` where the logits are not numbers, `UsageError` where no id may be chosen.
        """
        check_finite(bool(torch.isfinite(logits_V.max())))  # a NaN anywhere makes the maximum NaN
        token = self._choose(self.adjusted(logits_V, allowed_V))
        self.count(token)
        return token

    def count(self, token: int) -> None:
        """Count a chosen token for the penalties and for `min_tokens`."""
        self.num_chosen += 1
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._count_V is not None:
            self._count_V[token] += 1
        if self.params.has_penalties:
            self.counts[token] = self.counts.get(token, 0) + 1

    def uniform(self) -> float:
        """The number of the next draw, in [0, 1); for those who draw elsewhere."""
        return uniform(self._generator)

    def foresight(self) -> torch.Generator:
        """A generator that gives the numbers of the coming draws, and takes none of them away."""
        return self._generator.clone_state()

    @property
    def adjusts(self) -> bool:
        """Whether the next choice depends on more than the logits and the filters."""
        return self.params.has_penalties or self.params.restricts or bool(self.banned_ends)

    @property
    def banned_ends(self) -> frozenset[int]:
        """The ending ids that may not be chosen yet."""
        return self._ends if self.num_chosen < self.params.min_tokens else frozenset()

    def adjusted(self, logits_V: Tensor, allowed_V: Tensor | None = None) -> Tensor:
        """Logits [V] after penalties, bias and bans (steps 1 to 4)."""
        logits_V = self.penalized(logits_V)
        if self._bias_V is not None:
            logits_V = logits_V + self._bias_V
        if self._banned_V is not None:
            logits_V = logits_V.masked_fill(self._banned_V, -math.inf)
        if allowed_V is not None:
            logits_V = logits_V.masked_fill(~allowed_V, -math.inf)
        if self.banned_ends:
            ends = torch.tensor(sorted(self.banned_ends), device=logits_V.device)
            logits_V = logits_V.index_fill(0, ends, -math.inf)
        return logits_V

    def penalized(self, logits_V: Tensor) -> Tensor:
        """Logits [V] after the penalties for the tokens so far (steps 1 and 2)."""
        if self._seen_V is not None:
            logits_V = apply_repetition_penalty(logits_V, self._seen_V, self.params.repetition_penalty)
        if self._count_V is not None:
            present_V = (self._count_V > 0).to(logits_V.dtype)
            logits_V = (
                logits_V - self.params.presence_penalty * present_V - self.params.frequency_penalty * self._count_V
            )
        return logits_V

    def _choose(self, logits_V: Tensor) -> int:
        token = int(logits_V.argmax())
        check_choice(float(logits_V[token]))
        if self.params.greedy:
            return token
        return draw(filter_logits(logits_V, self.params), self._generator)


def check_finite(finite: bool) -> None:
    """Raise `NonFiniteError` unless a row of logits is finite."""
    if not finite:
        raise NonFiniteError("the model's logits are not finite; its weights are damaged, or try --dtype float32")


def check_choice(largest: float) -> None:
    """Raise `UsageError` where the largest logit after the bans is -inf."""
    if largest == -math.inf:
        raise UsageError("no token may come next: allowed_ids, banned_ids, min_tokens and the grammar rule out all")


def apply_repetition_penalty(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the seen ids (bool [V]) by `penalty` (Keskar et al. 2019)."""
    return torch.where(seen_V, torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


def filter_logits(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, top-k, top-p and min-p (steps 6 to 9): logits [V] with -inf where an id cannot be drawn."""
    if params.temperature != 1:
        logits_V = logits_V / params.temperature
    if 0 < params.top_k < logits_V.shape[-1]:
        logits_V = keep_top_k(logits_V, params.top_k)
    if params.top_p < 1:
        logits_V = keep_top_p(logits_V, params.top_p)
    if params.min_p > 0:
        logits_V = keep_min_p(logits_V, params.min_p)
    return logits_V


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest logit; ties with it stay."""
    threshold = logits_V.topk(k).values[-1]
    return logits_V.masked_fill(logits_V < threshold, -math.inf)


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """-inf on the unlikely tail whose probabilities together are at most 1 - p; the likeliest id always stays.

    Ids of probability (1 - p) / 2V and less are in the tail without being sorted: together they reach (1 - p) / 2.
    Few are left to sort, and sorting is what costs.
    """
    probabilities_V = logits_V.softmax(-1)
    likely_V = probabilities_V > (1 - p) / (2 * logits_V.shape[-1])
    unlikely_mass = probabilities_V.masked_fill(likely_V, 0).sum()
    likely_ids_N = likely_V.nonzero()[:, 0]
    ascending_ids_N = likely_ids_N[logits_V[likely_ids_N].argsort()]
    tail_N = unlikely_mass + probabilities_V[ascending_ids_N].cumsum(-1) <= 1 - p
    tail_N[-1] = False
    kept_ids_N = ascending_ids_N[~tail_N]
    return torch.full_like(logits_V, -math.inf).index_copy_(0, kept_ids_N, logits_V[kept_ids_N])


def keep_min_p(logits_V: Tensor, min_p: float) -> Tensor:
    """-inf on ids less likely than `min_p` times the likeliest."""
    probabilities_V = logits_V.softmax(-1)
    return logits_V.masked_fill(probabilities_V < min_p * probabilities_V.max(), -math.inf)


def uniform(generator: torch.Generator) -> float:
    """One number in [0, 1) of a CPU generator."""
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def draw(logits_V: Tensor, generator: torch.Generator) -> int:
    """One id from softmax(logits [V]), by one uniform number of the (CPU) generator."""
    return pick((logits_V - logits_V.max()).exp().double(), uniform(generator))


def pick(weights_V: Tensor, point: float) -> int:
    """The id at which the cumulative sum of fp64 weights [V] passes `point` (in [0, 1)) times their total."""
    cumulative_V = weights_V.cumsum(-1)
    # The first id whose cumulative weight exceeds the point: an id of weight 0 is never taken. Rounding could lift
    # the point to the total itself, which nothing exceeds.
    total = cumulative_V[-1:]
    points = torch.minimum(point * total, torch.nextafter(total, torch.zeros_like(total)))
    return int(torch.searchsorted(cumulative_V, points, right=True))
