"""How a checkpoint of an encoder-decoder is meant to be decoded: beams and lengths of its generation_config.json.

Older folders keep the same keys in config.json. What a person asks for comes first, then the folder, then the defaults
here. What is ruled about single ids (ends, banned ids) is part of the model's config.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trine.engine.errors import UsageError
from trine.engine.generate.beam import BeamParams
from trine.engine.log import warn
from trine.engine.model.weight_files import read_json

DEFAULT_BEAMS = 4
DEFAULT_MAX_TOKENS = 256
# Settings that change what is written and are not known here, with the value that changes nothing.
_UNKNOWN: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "forced_bos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """`beams`: None for greedy decoding. `no_repeat`: see `Constraints`. Lengths are of new ids."""

    beams: BeamParams | None
    max_tokens: int
    min_tokens: int
    no_repeat: int


def search_settings(
    folder: Path,
    *,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    early_stopping: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    no_repeat: int | None = None,
) -> SearchSettings:
    """What was asked for, completed by what the folder says. `early_stopping`: "true", "false" or "never".

    Says which settings of the folder are not applied. Raises `UsageError` for a value out of its range.
    """
    own = _read(folder)
    beams = _first(num_beams, own.get("num_beams"), DEFAULT_BEAMS)
    if early_stopping is not None and early_stopping not in _EARLY:
        raise UsageError(f"early stopping must be {', '.join(_EARLY)}, got {early_stopping!r}")
    if beams < 1:
        raise UsageError(f"--beams must be 1 (greedy) or more, got {beams}")
    found = BeamParams(
        num_beams=max(2, beams),
        length_penalty=float(_first(length_penalty, own.get("length_penalty"), 1.0)),
        early_stopping=_EARLY[early_stopping]
        if early_stopping is not None
        else _first(own.get("early_stopping"), False),
    )
    # Lengths in the file count what every target begins with.
    longest = own.get("max_new_tokens") or (own["max_length"] - 1 if own.get("max_length") else None)
    shortest = own.get("min_new_tokens") or max(0, (own.get("min_length") or 0) - 1)
    longest = _first(max_tokens, longest, DEFAULT_MAX_TOKENS)
    return SearchSettings(
        beams=found if beams > 1 else None,
        max_tokens=longest,
        min_tokens=min(_first(min_tokens, shortest), longest) if min_tokens is None else min_tokens,
        no_repeat=_first(no_repeat, own.get("no_repeat_ngram_size"), 0),
    )


_EARLY: dict[str, Any] = {"true": True, "false": False, "never": "never"}


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _read(folder: Path) -> dict[str, Any]:
    """The settings of a folder; generation_config.json decides where both files name one."""
    own: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            own |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    for key, neutral in _UNKNOWN.items():
        if own.get(key, neutral) != neutral:
            warn(f"{folder} asks for {key} = {own[key]!r}, which is not applied")
    return own
