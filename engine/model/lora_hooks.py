"""Where adapters reach a built model: hooks on its linear layers, which keep their parameters and names.

`MLP` multiplies with its layers' weights itself: while adapters are active its layers are called one by one instead, so
that their hooks are reached. While they are not, the model computes what it always did, captured graphs included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.transformer import Transformer
from trine.kernels.mlp.activation import activate, gated

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class LoraHooks:
    """Hooks on the layers of one model.

    Args:
        model: built.
        active: whether there is anything to add now.
        add: (layer, input, output) to the output with what is added; None leaves it as it is.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        active: Callable[[], bool],
        add: Callable[[str, Tensor, Tensor], Tensor | None],
    ) -> None:
        self._model, self._active, self._add = model, active, add
        self._hooked: set[str] = set()

    def put(self, name: str) -> None:
        """Hook a layer that `check_adaptable` lets pass, once."""
        path, _, last = name.rpartition(".")
        if last in _MLP and path not in self._hooked:
            mlp: Any = self._model.get_submodule(path)
            mlp.forward = partial(self._mlp_forward, mlp, mlp.forward)
            self._hooked.add(path)
        if name not in self._hooked:
            self._model.get_submodule(name).register_forward_hook(partial(self._hook, name), with_kwargs=True)
            self._hooked.add(name)

    def _hook(
        self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not self._active():
            return None
        _refuse(options.get("deterministic", False))
        return self._add(name, inputs[0], output)

    def _mlp_forward(self, mlp: Any, own: Any, x: Tensor, deterministic: bool = False) -> Tensor:
        """The feed-forward layer's own forward, or while adapters are active its layers one by one."""
        if not self._active():
            return own(x, deterministic)  # type: ignore[no-any-return]
        _refuse(deterministic)
        up = mlp.up_proj(x)
        h = activate(up, mlp.activation) if mlp.gate_proj is None else gated(mlp.gate_proj(x), up, mlp.activation)
        return mlp.down_proj(h)  # type: ignore[no-any-return]


def reaches(model: nn.Module, name: str) -> bool:
    """Whether a layer lies where its hook is reached: in attention, or in a feed-forward layer of our shape."""
    path, _, last = name.rpartition(".")
    parent = model.get_submodule(path)
    attention, mlp = (all(hasattr(parent, each) for each in names) for names in (_ATTENTION, _MLP))
    return (attention and last in _ATTENTION) or (mlp and last in _MLP)


def check_adaptable(model: nn.Module, name: str) -> None:
    """Raises `CheckpointError` for a layer that adapters cannot change."""
    if not reaches(model, name):
        parent = model.get_submodule(name.rpartition(".")[0])
        raise CheckpointError(f"the adapter changes {name}, a {type(parent).__name__}'s, which is not supported")


def _refuse(deterministic: bool) -> None:
    if deterministic:
        raise UsageError("deterministic=True with a LoRA adapter; leave it out, or merge the adapter (trine merge)")
