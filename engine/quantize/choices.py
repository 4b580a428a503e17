"""Which layers are quantized, and in which scheme: one for all, or others for those that a pattern names.

A pattern is a glob over the path that a layer has on disk (`*.down_proj`, `model.layers.0.*`), or after "re:" a regular
expression that matches from its start; the first one that fits a layer decides. Layers that vLLM multiplies as one must
come out alike.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import Opened
from trine.engine.model.families import TensorRule
from trine.engine.model.quantized.compressed_tensors import Quantization
from trine.engine.model.quantized.plan import linear_rules
from trine.engine.model.quantized.scheme import Scheme, make_scheme
from trine.engine.quantize.check import FUSED

_IN_BLOCK = re.compile(r"(.*\.)?layers\.\d+\.")
_ROUTERS = (".mlp.gate.weight", ".mlp.shared_expert_gate.weight")


@dataclass(frozen=True)
class Override:
    """What the layers of a pattern become: another scheme, or None to stay as they are. `text` is how it was given."""

    text: str
    pattern: str
    scheme: Scheme | None

    def matches(self, path: str) -> bool:
        if self.pattern.startswith("re:"):
            return re.match(self.pattern.removeprefix("re:"), path) is not None
        return fnmatch.fnmatchcase(path, self.pattern)


def parse_override(text: str) -> Override:
    """`PATTERN=SCHEME`, `PATTERN=SCHEME:GROUP`, `PATTERN=SCHEME:GROUP:asymmetric` or `PATTERN=none`.

    Raises `UsageError`, naming the part that is wrong.
    """
    pattern, equals, what = text.rpartition("=")
    if not equals or not pattern or not what:
        raise UsageError(f"--override {text!r} is not PATTERN=SCHEME, such as '*.down_proj=w8a16' or '*.0.*=none'")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise UsageError(f"--override {text!r} holds no regular expression: {error}") from None
    if what == "none":
        return Override(text, pattern, None)
    name, *settings = what.split(":")
    asymmetric = "asymmetric" in settings[-1:]
    sizes = settings[:-1] if asymmetric else settings
    if len(sizes) > 1:
        raise UsageError(f"--override {text!r} says more than SCHEME:GROUP:asymmetric after the pattern")
    scheme = make_scheme(name, group_size=sizes[0] if sizes else None, symmetric=not asymmetric)
    return Override(text, pattern, scheme)


def is_left(rule: TensorRule) -> bool:
    """Whether a linear layer is never quantized: outside the blocks, or what decides which experts a token goes to."""
    return not _IN_BLOCK.match(rule.ours[0]) or rule.ours[0].endswith(_ROUTERS)


@dataclass(frozen=True)
class Layer:
    """A weight [N, K] to quantize; `rule` says which layers of the model it is."""

    rule: TensorRule
    path: str
    num_features: int
    width: int
    scheme: Scheme


def choose_layers(
    opened: Opened, scheme: Scheme, overrides: Sequence[Override], *, transposes: bool
) -> dict[str, Layer]:
    """The weights to quantize by their names on disk, the output layer excepted.

    `transposes`: whether the format holds layers that are stored [in, out]. Raises `UsageError` for a pattern without
    layers, for layers that vLLM fuses and that come out different, and where a layer does not fit its scheme;
    `CheckpointError` for layers that the format does not hold.
    """
    found: dict[str, Layer] = {}
    used: set[Override] = set()
    kept: dict[str, Scheme | None] = {}
    for name, (rule, num_features, width) in linear_rules(opened.model, opened.rules, experts=True).items():
        path = name.removesuffix(".weight")
        if is_left(rule):
            continue
        override = next((one for one in overrides if one.matches(path)), None)
        used.update([] if override is None else [override])
        chosen = kept[path] = scheme if override is None else override.scheme
        if chosen is None:
            continue
        if rule.transpose and not transposes:
            raise CheckpointError(
                f"{path} is stored [in, out], as {opened.model.config.family} does, which compressed-tensors does not "
                "hold quantized; --format gptq does"
            )
        if rule.groups > 1 and chosen.strategy == "block":
            raise CheckpointError(
                f"{path} joins its layers head by head, which blocks of 128 outputs cut; choose another --scheme"
            )
        chosen.check_shape(path, num_features, width)
        found[name] = Layer(rule, path, num_features, width, chosen)
    unused = next((one for one in overrides if one not in used), None)
    if unused is not None:
        some = ", ".join(sorted(kept)[:2])
        raise UsageError(f"--override {unused.text!r} names no layer that no earlier one names; layers are {some} ...")
    if not found:
        raise UsageError("every layer is left as it was; nothing would be quantized")
    _check_fused(kept)
    return found


def _check_fused(schemes: Mapping[str, Scheme | None]) -> None:
    by_parent: dict[str, dict[str, Scheme | None]] = defaultdict(dict)
    for path, scheme in schemes.items():
        parent, _, last = path.rpartition(".")
        by_parent[parent][last] = scheme
    for parent, layers in by_parent.items():
        for names in FUSED:
            there = {name: layers[name] for name in names if name in layers}
            if len(set(there.values())) > 1:
                said = ", ".join(f"{name} {'none' if s is None else s.describe()}" for name, s in there.items())
                raise UsageError(
                    f"{parent} would have different schemes in layers that vLLM multiplies as one ({said}); "
                    f"let --override name {', '.join(there)} alike"
                )


def quantization_of(layers: Iterable[Layer], all_paths: Iterable[str], scheme: Scheme) -> Quantization:
    """As config.json tells it: `scheme` for all layers but those that are named."""
    schemes = {layer.path: layer.scheme for layer in layers}
    paths: dict[Scheme, list[str]] = defaultdict(list)
    for path, other in schemes.items():
        if other != scheme:
            paths[other].append(path)
    groups: list[tuple[tuple[str, ...], Scheme]] = [((*named,), other) for other, named in paths.items()]
    if scheme in schemes.values():
        groups.append((("Linear",), scheme))
    return Quantization(groups=tuple(groups), ignore=tuple(path for path in all_paths if path not in schemes))
