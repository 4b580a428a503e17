"""An inspection as text for a person: one subject a line, named on the left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trine.engine.inspect.records import Architecture, Inspection, Memory, Quantization, Text, Weights
from trine.engine.log import format_bytes, format_count, printable

_LEFT = 16
_FILES = 12


def lines(found: Inspection) -> Iterator[str]:
    """The lines of an inspection, problems last."""
    yield f"{found.path}: {found.kind}"
    for name, texts in _subjects(found):
        for number, text in enumerate(texts):
            yield printable(f"{'' if number else name:<{_LEFT}}{text}").replace("\n", "\\n").rstrip()


def _subjects(found: Inspection) -> Iterator[tuple[str, list[str]]]:
    if found.architecture is not None:
        yield "model", list(_architecture(found.architecture))
        yield "context", list(_context(found.architecture))
    if found.parameters is not None:
        counts = found.parameters
        parts = ", ".join(f"{name} {format_count(number)}" for name, number in counts.parts.items())
        active = f", {format_count(counts.active)} of them for each token" if counts.active < counts.total else ""
        yield "parameters", [f"{format_count(counts.total)} ({counts.total:,}){active}", parts]
    if found.adapter is not None:
        yield "adapter", list(_adapter(found.adapter))
    if found.weights is not None:
        yield "weights", list(_weights(found.weights))
    if found.quantization is not None:
        yield "quantization", list(_quantization(found.quantization))
    if found.text is not None:
        yield "tokenizer", list(_tokenizer(found.text))
        yield "chat template", [", ".join(found.text.templates) or "none"]
    if found.memory is not None:
        yield "memory", list(_memory(found.memory))
    if found.training is not None:
        yield "training", list(_training(found.training))
    if found.notes:
        yield "notes", found.notes
    yield "problems", found.problems or ["none found"]


def _architecture(one: Architecture) -> Iterator[str]:
    task = "" if one.task is None else f" for {one.task.replace('_', ' ')}"
    yield f"{one.family}, {'an' if one.shape[0] == 'e' else 'a'} {one.shape}{task}"
    layers = f"{one.layers} layers"
    if one.encoder_layers is not None:
        layers = f"{one.encoder_layers} layers of the encoder and {one.layers} of the decoder,"
    groups = "" if one.kv_heads == one.heads else f" over {one.kv_heads} of keys and values"
    yield f"{layers} of width {one.width:,}; {one.heads} heads of {one.head_width}{groups}"
    experts = "" if one.experts is None else f"; {one.experts_per_token} of {one.experts} experts for each token"
    yield f"feed-forward width {one.ffn_width:,}{experts}"
    tied = "tied to the output layer" if one.tied else "its own output layer"
    yield f"vocabulary of {one.vocabulary:,}, {tied if one.task is None else 'tied' if one.tied else 'not tied'}"
    if one.settings:
        yield ", ".join(f"{name} {_short(value)}" for name, value in one.settings.items())


def _context(one: Architecture) -> Iterator[str]:
    window = "" if one.window is None else f", a window of {one.window:,} in some layers"
    limit = ", as trained: positions are relative and have no end" if one.positions == "relative" else ""
    yield f"{one.context:,} tokens{window}{limit}"
    if one.rope is None:
        yield f"{one.positions} positions"
        return
    more = {name: value for name, value in one.rope.items() if name not in ("kind", "theta")}
    rest = "".join(f", {name} {_short(value)}" for name, value in more.items())
    yield f"rotary positions: {one.rope['kind']}, theta {one.rope['theta']:,g}{rest}"


def _adapter(one: dict[str, Any]) -> Iterator[str]:
    yield f"{one['kind']}, rank {one['rank']}, alpha {one['alpha']}"
    yield f"on {', '.join(one['modules'])}"
    fits = {None: "not checked", True: "they fit", False: "they do not fit"}[one["fits"]]
    yield f"base {one['base'] or 'not named'}: {fits}"


def _weights(one: Weights) -> Iterator[str]:
    files, tensors = len(one.files), sum(one.tensors_by_dtype.values())
    yield f"{format_bytes(one.num_bytes)} in {files} file{'' if files == 1 else 's'}, {tensors:,} tensors"
    yield ", ".join(
        f"{kind} {format_bytes(num_bytes)} ({one.tensors_by_dtype[kind]:,})"
        for kind, num_bytes in one.bytes_by_dtype.items()
    )
    for number, (name, size) in enumerate(one.files.items()):
        if number == _FILES:
            yield f"and {files - _FILES} more files"
            return
        yield f"{name}  {format_bytes(size['bytes'])}, {size['tensors']:,} tensors"


def _quantization(one: Quantization) -> Iterator[str]:
    yield one.format + ("" if one.method is None else f", found by {one.method}")
    for scheme, number in one.schemes.items():
        yield f"{number:,} x {scheme}"
    if one.plain:
        yield f"{one.plain:,} x as they were"
    if one.cache is not None:
        yield f"asks for a key/value cache in {one.cache}"
    yield from one.notes


def _tokenizer(one: Text) -> Iterator[str]:
    mark = "" if one.fingerprint is None else f", fingerprint {one.fingerprint[:12]}"
    yield f"{one.kind}, {one.size:,} ids{mark}"
    if one.special:
        yield ", ".join(f"{role.removesuffix('_token')} {it['text']} ({it['id']})" for role, it in one.special.items())
    around = [f"{' '.join(one.begins)} before" if one.begins else "", f"{' '.join(one.ends)} after" if one.ends else ""]
    if any(around):
        yield f"puts {' and '.join(each for each in around if each)} a text"


def _memory(one: Memory) -> Iterator[str]:
    yield f"{format_bytes(one.weights)} of weights once loaded in {one.dtype}"
    if one.cache_per_token:
        full = format_bytes(one.cache_full)
        yield f"{format_bytes(one.cache_per_token)} of cache for each token, {full} for a full context"
        yield f"{format_bytes(one.serve)} to serve one text of full length, beside activations (an estimate)"


def _training(one: dict[str, Any]) -> Iterator[str]:
    loss = "" if one["validation_loss"] is None else f", validation loss {one['validation_loss']:.4f}"
    yield f"step {one['step']:,}, {format_count(one['tokens'])} tokens{loss}"


def _short(value: Any) -> str:
    """A setting in few words: long lists by their number."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_short(each)}" for name, each in value.items()) + ")"
    if isinstance(value, (tuple, list)):
        return f"({len(value)} of them)" if len(value) > 8 else "(" + ", ".join(map(str, value)) + ")"
    return (
        f"{value:g}" if isinstance(value, float) else "yes" if value is True else "no" if value is False else str(value)
    )
