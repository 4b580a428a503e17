"""Quantization-aware training: losses are those of the rounded weights, updates are made to the exact ones.

    w^ = s (q(w) - z)  as the method of the recipe quantizes it        dL/dw := dL/dw^   ("straight through")

Weights are rounded once for each step, in the dtype that `final/` is written in, as `trine quantize` will find them
there: what was trained is, to the bit, what its folder holds. They take the place of the exact ones while a step
computes, so that every kernel works as always; the exact ones lie aside for as long. Where a scheme quantizes
activations too, the inputs of the layers are rounded on their way, with the gradient straight through.

Source: Bengio et al. (arXiv 1308.3432); Jacob et al. (arXiv 1712.05877).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trine.engine.errors import UsageError
from trine.engine.log import say
from trine.engine.model.blocks import MLP, Attention
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import FAMILIES, TensorRule
from trine.engine.model.quantized.plan import linear_rules
from trine.engine.model.quantized.scheme import GROUP_SIZES, Scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.fake import fake_quantize_activations
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.train.durable import remove_folder
from trine.engine.train.recipe_model import QuantizationSettings
from trine.kernels.mlp.activation import activate, gated

_HEAD = ("lm_head.weight",)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor of the checkpoint that will be quantized, and the parameters that it holds."""

    rule: TensorRule
    parameters: tuple[nn.Parameter, ...]


class Rounding:
    """Rounds the layers of one model as a recipe's [quantization] says; `stored`: the dtype of `final/`."""

    def __init__(self, model: Transformer, settings: QuantizationSettings, *, stored: torch.dtype) -> None:
        self._settings, self._stored = settings, stored
        self._quantize = METHODS[settings.method].quantize
        parameters = dict(model.named_parameters())
        self._weights = [
            _Weight(rule, tuple(parameters[name] for name in rule.ours))
            for rule in check_layers(model.config, settings)
        ]
        if settings.scheme_settings.activations != "none":
            _round_inputs(model, settings.scheme_settings)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, the layers have their rounded weights; they get the gradients of the exact ones."""
        exact = {parameter: parameter.data for weight in self._weights for parameter in weight.parameters}
        try:
            for weight in self._weights:
                for parameter, rounded in zip(weight.parameters, self._rounded(weight), strict=True):
                    parameter.data = rounded
            yield
        finally:
            for parameter, data in exact.items():
                parameter.data = data

    @torch.no_grad()
    def _rounded(self, weight: _Weight) -> list[Tensor]:
        parts = [parameter.data for parameter in weight.parameters]
        joined_NK = weight.rule.join(parts).to(self._stored)
        rounded_NK = self._quantize(joined_NK, self._settings.scheme_settings).dequantize(parts[0].dtype)
        return [part.contiguous() for part in weight.rule.split(rounded_NK, [len(part) for part in parts])]

    def export(self, final: Path) -> Path:
        """Quantize `final/` by the ordinary process into the folder beside it; returns that."""
        settings = self._settings
        out = final.parent / f"{final.name}-{settings.scheme}"
        if out.exists():  # of an earlier end of this run
            remove_folder(out)
        quantize_checkpoint(
            final,
            out,
            Settings(
                scheme_name=settings.scheme,
                scheme=settings.scheme_settings,
                method_name=settings.method,
                method=METHODS[settings.method],
            ),
        )
        say(f"the quantized model is in {out}")
        return out


def check_layers(config: ModelConfig, settings: QuantizationSettings) -> list[TensorRule]:
    """The tensors that will be quantized: all linear layers but the output layer.

    Raises `UsageError` for a layer that does not fit the scheme, or a family whose layers the format does not hold.
    """
    scheme = settings.scheme_settings
    found = []
    rules = FAMILIES[config.family].rules(config)
    for name, (rule, _, width) in linear_rules(Transformer(config, device="meta"), rules).items():
        if rule.ours == _HEAD:
            continue
        if rule.transpose:
            raise UsageError(
                f"[quantization] does not fit {config.family}: {name} is stored [in, out], which compressed-tensors "
                "does not hold quantized; train another family so"
            )
        if scheme.group_size is not None and width % scheme.group_size:
            fitting = [str(size) for size in GROUP_SIZES if width % size == 0]
            raise UsageError(
                f"quantization.group_size = {scheme.group_size} does not fill the {width} columns of {name}; set it to "
                f"{' or '.join([*fitting, 'channel'])}"
            )
        found.append(rule)
    return found


def _round_inputs(model: Transformer, scheme: Scheme) -> None:
    """Hooks that round what the layers of blocks get; a feed-forward layer calls its layers one by one then."""

    def rounded(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return fake_quantize_activations(inputs[0], scheme), *inputs[1:]

    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(rounded)
            module.o_proj.register_forward_pre_hook(rounded)
        elif isinstance(module, MLP):
            module.register_forward_pre_hook(rounded)
            module.down_proj.register_forward_pre_hook(rounded)
            module.forward = partial(_layer_by_layer, module)  # type: ignore[method-assign]


def _layer_by_layer(mlp: MLP, x_BTC: Tensor, deterministic: bool = False) -> Tensor:
    if deterministic:
        raise UsageError("deterministic=True while training with [quantization]; leave it out")
    up = mlp.up_proj(x_BTC)
    h = activate(up, mlp.activation) if mlp.gate_proj is None else gated(mlp.gate_proj(x_BTC), up, mlp.activation)
    return mlp.down_proj(h)  # type: ignore[no-any-return]
