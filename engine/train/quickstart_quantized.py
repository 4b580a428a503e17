"""The end of the quickstart: the trained model in 8 and in 4 bits, beside itself.

    OUT/w8a8    8-bit integers, activations too      OUT/w4a16    4-bit integers in groups

Both by methods that need no data. What they cost is measured on a part of the held-out files, the same for all three,
and what they bring as bytes of weights and as tokens a second on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from trine.engine.evaluate.perplexity import perplexity
from trine.engine.generate.load import load_for_inference
from trine.engine.log import say
from trine.engine.model.checkpoint import read_config
from trine.engine.model.config import ModelConfig
from trine.engine.model.quantized.scheme import GROUP_SIZES, Scheme, make_scheme
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.quality import measure_speed
from trine.engine.quantize.run import Settings, quantize_checkpoint

SCHEMES = {"w8a8": "rtn", "w4a16": "rtn-mse"}
# Text that is measured on: enough to tell the three apart, little enough for the quickstart's time.
_TEXT_BYTES = 64_000


@dataclass(frozen=True)
class Variant:
    """A model as it can be used: bytes of its weights, bits per byte of text, tokens per second of one stream."""

    name: str
    folder: Path
    bytes: int
    bits_per_byte: float
    tokens_per_second: float


def quantize_variants(out: Path, texts: Sequence[str]) -> list[Variant]:
    """Quantize `out`/final, and measure it and the results on the first of these texts. What is there is kept."""
    final = out / "final"
    config = read_config(final)
    ends = accumulate(len(text.encode()) for text in texts)
    some = [text for text, end in zip(texts, ends, strict=True) if end <= _TEXT_BYTES] or [texts[0][:_TEXT_BYTES]]
    found: dict[str, Variant] = {}
    for name, method in SCHEMES.items():
        folder = out / name
        if not folder.is_dir():
            say(f"quantizing to {name}")
            settings = Settings(
                scheme_name=name,
                scheme=_fitting(name, config),
                method_name=method,
                method=METHODS[method],
                resume=(out / f".writing-{name}").is_dir(),
            )
            quantize_checkpoint(final, folder, settings)
        speed = measure_speed(final, folder)
        rates = {"as trained": speed.decode_before, name: speed.decode_after}
        for variant, where in {"as trained": final, name: folder}.items():
            if variant not in found:
                found[variant] = Variant(variant, where, _bytes(where), _bits_per_byte(where, some), rates[variant])
    return list(found.values())


def _fitting(name: str, config: ModelConfig) -> Scheme:
    """The scheme, in the largest groups that fill the rows of every layer."""
    if name != "w4a16":
        return make_scheme(name)
    widths = (config.width, config.num_heads * config.head_dim, config.ffn_width)
    fitting = (str(size) for size in reversed(GROUP_SIZES) if not any(width % size for width in widths))
    return make_scheme(name, group_size=next(fitting, "channel"))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _bits_per_byte(folder: Path, texts: Sequence[str]) -> float:
    model, tokenizer = load_for_inference(folder)
    return perplexity(model, tokenizer, texts).bits_per_byte
