"""What a task of lm-evaluation-harness asks of generation, as `SamplingParams`.

Tasks speak the words of several libraries: `max_gen_toks`, `max_new_tokens` and two more are one thing; without
`do_sample` a temperature above 0 means sampling and none means the likeliest token. What would change an answer and is
not computed here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trine.engine.errors import UsageError
from trine.engine.generate.sampling import SamplingParams

DEFAULT_TOKENS = 256
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLER = {"top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}
# Settings with the one value that says what is done anyway.
_PLAIN: Mapping[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}


def sampling_of(wanted: Mapping[str, Any], *, stop_ids: Sequence[int], seed: int) -> SamplingParams:
    """Parameters of a `generate_until` request; `seed` counts where it samples.

    Raises `UsageError` for a setting that is not known, or of a wrong type.
    """
    left = dict(wanted)
    until = left.pop("until", None)
    stop = [until] if isinstance(until, str) else list(until or ())
    if not all(isinstance(text, str) for text in stop):
        raise UsageError(f"until = {until!r} in a task's generation_kwargs; give texts")
    given = [left.pop(name) for name in _LENGTHS if left.get(name) is not None]
    max_tokens = int(given[0]) if given else DEFAULT_TOKENS
    sample, temperature = left.pop("do_sample", None), float(left.pop("temperature", None) or 0.0)
    greedy = temperature == 0 if sample is None else not sample
    if not greedy and temperature == 0:
        temperature = 1.0  # transformers' default for do_sample
    sampler = {name: kind(left.pop(name)) for name, kind in _SAMPLER.items() if left.get(name) is not None}
    if greedy:
        sampler = {name: value for name, value in sampler.items() if name == "repetition_penalty"}
    for name, value in left.items():
        if value is not None and (name not in _PLAIN or value != _PLAIN[name]):
            raise UsageError(
                f"a task's generation_kwargs ask for {name} = {value!r}, which Trine does not compute; known: until, "
                f"{', '.join(_LENGTHS)}, do_sample, temperature, {', '.join(_SAMPLER)}"
            )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else temperature,
        stop=tuple(dict.fromkeys(text for text in stop if text)),
        stop_ids=tuple(stop_ids),
        seed=None if greedy else seed,
        **sampler,
    )


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these strings, as the harness cuts it."""
    for each in stop:
        text = text.split(each)[0]
    return text
