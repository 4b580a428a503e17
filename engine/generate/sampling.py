"""How one token is chosen from the logits of one position.

Order of operations, the same as transformers' (4.57 and 5.x), on fp32 logits:

    1. repetition penalty      l > 0: l / penalty, l < 0: l * penalty, for every id in the prompt or the output
    2. presence, frequency     l - presence * (count > 0) - frequency * count, counts over the output only (OpenAI)
    3. greedy (temperature 0)  argmax; the rest does not apply
    4. temperature             l / temperature
    5. top-k                   keep the k largest (and what ties with the k-th)
    6. top-p                   keep the smallest set of likeliest ids whose probability reaches p (Holtzman et al. 2019)
    7. min-p                   keep ids with at least min_p times the probability of the likeliest (Nguyen et al. 2024)
    8. draw                    one uniform number through the inverse of the cumulative distribution, in float64

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
        ignore_eos: go on after an end-of-sequence token.
        n: completions per prompt; choice 0 is what n=1 gives with the same seed.

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
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{field.name} must be a finite number, got {value}")
            if isinstance(value, str):  # a bare string for `stop` would pass for a tuple of its characters
                raise UsageError(f"{field.name} must be a tuple of strings, got the string {value!r}")
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
        if self.temperature == 0 and self.n > 1:
            raise UsageError(
                f"n = {self.n} with temperature 0 repeats one completion; set a temperature above 0 or n = 1"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens so far in any way but through the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


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
        device: where the logits will lie. The generator stays on the CPU, so a seed means the same everywhere.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Iterable[int],
        vocab_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.params = params
        self._generator = torch.Generator().manual_seed(seed)
        self._seen_V: Tensor | None = None
        self._count_V: Tensor | None = None
        if params.repetition_penalty != 1:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[list(prompt_ids)] = True
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            self._count_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)

    def next_token(self, logits_V: Tensor) -> int:
        """Choose from fp32 logits [V] (left unchanged) and count the choice for the penalties.

        Raises `NonFiniteError` where the logits are not numbers.
        """
        if not torch.isfinite(logits_V.max()):  # a NaN anywhere makes the maximum NaN
            raise NonFiniteError("the model's logits are not finite; its weights are damaged, or try --dtype float32")
        token = self._choose(self.penalized(logits_V))
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._count_V is not None:
            self._count_V[token] += 1
        return token

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
        if self.params.greedy:
            return int(logits_V.argmax())
        return draw(filter_logits(logits_V, self.params), self._generator)


def apply_repetition_penalty(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the seen ids (bool [V]) by `penalty` (Keskar et al. 2019)."""
    return torch.where(seen_V, torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


def filter_logits(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, top-k, top-p and min-p (steps 4 to 7): logits [V] with -inf where an id cannot be drawn."""
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


def draw(logits_V: Tensor, generator: torch.Generator) -> int:
    """One id from softmax(logits [V]), by one uniform number of the (CPU) generator."""
    uniform = torch.rand((), dtype=torch.float64, generator=generator).item()
    cumulative_V = (logits_V - logits_V.max()).exp().double().cumsum(-1)
    # The first id whose cumulative weight exceeds the point: an id of weight 0 is never taken. Rounding could lift
    # the point to the total itself, which nothing exceeds.
    total = cumulative_V[-1].item()
    point = min(uniform * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(cumulative_V, point, right=True))
