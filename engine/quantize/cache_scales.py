"""Static scales of a key/value cache in fp8, as vLLM takes them: for each layer, from the largest numbers seen in it.

    k_scale = max |k| / 448      v_scale = max |v| / 448      fp32 [1], beside the layers of an attention

Keys are those that are cached: normed, and turned by their positions. They are measured while the calibration samples
pass through a layer whose weights are codes already. What is larger than all that was seen becomes 448 in the cache, so
that the samples should be like what the model will read.

Source: the behaviour of the compressed-tensors package, against which the tests compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trine.engine.errors import NonFiniteError
from trine.engine.model.blocks import Attention
from trine.engine.model.families import TensorRule

NAMES = ("k_scale", "v_scale")
LARGEST = 448.0


def attention_paths(model: nn.Module, rules: Iterable[TensorRule]) -> dict[str, str]:
    """Where the scales of each attention lie on disk (`model.layers.0.self_attn`), by its name in the model."""
    stored = {name: rule.stored for rule in rules for name in rule.ours}
    return {
        name: stored[f"{name}.k_proj.weight"].removesuffix(".weight").rpartition(".")[0]
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    }


class CacheScales:
    """Of a model whose layers are passed one after the other. `paths`: as of `attention_paths`."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = paths
        self._largest: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, model: nn.Module, part: str) -> Iterator[None]:
        """Meanwhile, what the attention of a layer caches is looked at."""

        def look(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(module, Attention)
            _, k_BKTD, v_BKTD = module.heads(*inputs)
            largest_2 = torch.stack([x.abs().max().float() for x in (k_BKTD, v_BKTD)])
            self._largest[name] = torch.maximum(self._largest.get(name, torch.zeros(2)), largest_2)

        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda *given, name=name: look(name, *given))
            for name in self._paths
            if name.startswith(f"{part}.")
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def tensors(self) -> dict[str, Tensor]:
        """The scales by their names on disk; 1 where nothing but zeros was seen.

        Raises `NonFiniteError` where keys or values are no numbers.
        """
        found = {}
        for name, path in self._paths.items():
            for kind, largest in zip(NAMES, self._largest[name], strict=True):
                if not bool(largest.isfinite()):
                    raise NonFiniteError(
                        f"{path} has keys or values that are no numbers, so that they have no {kind}; the checkpoint "
                        "is damaged, or try --dtype float32"
                    )
                found[f"{path}.{kind}"] = (largest / LARGEST if largest > 0 else torch.ones(())).reshape(1)
        return found
