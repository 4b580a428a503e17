"""Registrations that no other file reaches: backwards, checked on the arguments that autograd gives them."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trine.kernels.attention.op import attention, make_mask
from trine.kernels.cross_entropy.logits import cross_entropy
from trine.kernels.cross_entropy.op import linear_cross_entropy
from trine.kernels.cross_entropy.token_log_probs import token_log_probs
from trine.kernels.layer_norm import layer_norm
from trine.kernels.mlp.op import gated_mlp
from trine.kernels.moe.combine import combine
from trine.kernels.moe.groups import group_by_expert
from trine.kernels.moe.matmul import grouped_matmul
from trine.kernels.moe.op import moe_mlp
from trine.kernels.quantized.op import rms_norm_quantize
from trine.kernels.rms_norm import rms_norm
from trine.kernels.rope.op import rope, rope_heads, rope_tables
from trine.kernels.samples import OPERATIONS
from trine.kernels.sampling.op import penalize

HERE = Path(__file__).parent
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Recorder(TorchDispatchMode):
    """Keeps the first call of every operation of this project, with copies of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        name = func.name()
        if name.startswith("trine::") and name not in self.calls:
            copied = tree_map_only(Tensor, lambda x: x.detach().clone(), (tuple(args), named))
            self.calls[name] = (func, *copied)
        return func(*args, **named)


TARGETS = torch.tensor([3, 0, 5, -100])
IDS = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0], [1, 2]])
COS, SIN = rope_tables(torch.arange(5)[None], torch.tensor([1.0, 0.5, 0.1]), torch.float32)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, mask=make_mask(causal=True, num_keys=9))


def _heads(qkv: Tensor, weight: Tensor) -> Tensor:
    return torch.cat(rope_heads(qkv, COS, SIN, 2, 1, q_norm_weight=weight, k_norm_weight=weight), dim=1)


def _moe(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return moe_mlp(x, IDS, weights, gate, up, down, activation="silu")


EXPERTS = (3, 6, 8), (3, 6, 8), (3, 8, 6)
# By operation: a function whose backward calls it, and the shapes of the function's arguments.
BACKWARDS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms_norm_backward": (lambda x, w: rms_norm(x, w, 1e-6), ((5, 16), (16,))),
    "layer_norm_backward": (lambda x, w, b: layer_norm(x, w, b, 1e-5), ((5, 16), (16,), (16,))),
    "attention_backward": (_attention, ((1, 2, 9, 16), (1, 1, 9, 16), (1, 1, 9, 16))),
    "mlp_backward": (lambda *tensors: gated_mlp(*tensors, activation="silu"), ((5, 8), (6, 8), (6, 8), (8, 6))),
    "rope_heads_backward": (_heads, ((2, 5, 32), (8,))),
    "rope_rotate": (lambda x: rope(x, COS, SIN), ((2, 5, 3, 8),)),
    "cross_entropy_backward": (lambda x: cross_entropy(x * 2, TARGETS), ((4, 7),)),
    "cross_entropy_backward_in_place": (lambda x: cross_entropy(x * 2, TARGETS, inplace=True), ((4, 7),)),
    "scale_loss_gradients": (lambda x, w: linear_cross_entropy(x, w, TARGETS) * 2, ((4, 8), (7, 8))),
    "token_log_probs_backward": (lambda x, w: token_log_probs(x, w, TARGETS), ((4, 8), (7, 8))),
    "grouped_matmul_backward": (lambda x, w: grouped_matmul(x, w, group_by_expert(IDS, 3)), ((5, 8), (3, 6, 8))),
    "moe_combine_backward": (lambda x, w: combine(x, w, group_by_expert(IDS, 3)), ((10, 8), (5, 2))),
    "moe_mlp_backward": (_moe, ((5, 8), (5, 2), *EXPERTS)),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_registration_of_what_a_backward_calls(name: str) -> None:
    function, shapes = BACKWARDS[name]
    leaves = [make(*shape, seed=place).requires_grad_() for place, shape in enumerate(shapes)]
    with Recorder() as recorder:
        seen = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    unseen = torch.autograd.grad(function(*leaves).square().sum(), leaves)  # without the dispatcher
    assert all(torch.equal(a, b) for a, b in zip(seen, unseen, strict=True))
    operation, arguments, named = recorder.calls[f"trine::{name}"]
    torch.library.opcheck(operation, arguments, named)


def _rotated(x: Tensor) -> Tensor:
    return rope(x, COS, SIN)


def _normed(x: Tensor) -> Tensor:
    rows, _ = rms_norm_quantize(x, torch.ones(16), 1e-6, kind=torch.int8)
    return rows.codes.float() * rows.scales.sum()


def _penalized(x: Tensor) -> Tensor:
    logits = x * 2
    lists = [torch.tensor(values, dtype=torch.int32) for values in ([0, 1, 2, 2], [5, 6], [1, 2])]
    starts, tokens, counts = lists
    penalties = torch.full((3,), 1.5)
    penalize(
        logits, starts=starts, tokens_M=tokens, counts_M=counts, repetition_R=penalties, presence_R=penalties,
        frequency_R=penalties,
    )  # fmt: skip
    return logits


@pytest.mark.parametrize(
    ("name", "function", "shape"),
    [
        ("rope_rotate", _rotated, (2, 5, 3, 8)),
        ("rms_norm_quantize", _normed, (5, 16)),
        ("adjust_logits", _penalized, (3, 9)),
    ],
)
def test_compiles_whole(name: str, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    targets: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    x = make(*shape)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), function(x))
    assert f"trine.{name}.default" in targets


def _registered() -> dict[str, str]:
    """The name in Python of every registered operation, by its own name."""
    found = {}
    for path in (HERE.parents[1] / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for decorator in node.decorator_list:
                    name = re.match(r"torch\.library\.custom_op\('trine::(\w+)'", ast.unparse(decorator))
                    if name:
                        found[name[1]] = node.name
    return found


def test_every_registered_operation_is_checked() -> None:
    for module in OPERATIONS:
        importlib.import_module(f"trine.kernels.{module}")
    named = _registered()
    loaded = {name.removeprefix("trine::") for name in torch._C._dispatch_get_all_op_names() if "trine::" in name}
    assert loaded <= named.keys()
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(HERE.glob("test_*.py")))
    checked = set(re.findall(r"\b(?:opcheck|check)\(\s*(?:\w+\.)?(\w+),", text))
    assert [name for name in sorted(named) if name not in BACKWARDS and named[name] not in checked] == []
