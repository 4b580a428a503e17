"""The cross-entropy and distillation kernels in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.cross_entropy.distillation import linear_distillation, linear_distillation_forward
from trine.kernels.cross_entropy.logits import cross_entropy, cross_entropy_and_log_probs, cross_entropy_forward
from trine.kernels.cross_entropy.op import (
    linear_cross_entropy,
    linear_cross_entropy_and_log_probs,
    linear_cross_entropy_forward,
)
from trine.kernels.cross_entropy.reference import (
    cross_entropy_reference,
    distillation_reference,
    linear_cross_entropy_reference,
    project,
    token_log_probs_reference,
)
from trine.kernels.cross_entropy.token_log_probs import token_log_probs, token_log_probs_forward

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Blocks are of 32 numbers of a row, and of 16 rows, columns and inner numbers of a product.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 2.0},
    "all": {"label_smoothing": 0.3, "z_loss": 3e-2, "softcap": 3.0, "ignore_index": 4},
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# Rows, width, vocabulary.
SHAPES = pytest.mark.parametrize("shape", [(1, 5, 3), (17, 16, 32), (5, 33, 123), (19, 20, 70)], ids=str)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def head(shape: tuple[int, int, int], dtype: torch.dtype, weights: torch.dtype | None = None) -> list[Tensor]:
    """hidden, weight, bias, of logits of a few units."""
    n, c, v = shape
    kind = weights or dtype
    return [make(n, c, dtype=dtype), (make(v, c, seed=1) * 2 / c**0.5).to(kind), make(v, dtype=kind, seed=2)]


def targets_for(n: int, v: int, ignore_index: int = -100) -> Tensor:
    """Every fourth is ignored."""
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(5))
    targets[1::4] = ignore_index
    return targets


def ignored(options: dict[str, Any]) -> int:
    return int(options.get("ignore_index", -100))


@DTYPES
@ALL_OPTIONS
def test_cross_entropy(compare: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    for n, v in ((1, 5), (7, 123), (6, 64)):
        targets = targets_for(n, v, ignored(options))
        compare.gradients(
            "cross_entropy",
            lambda x, targets=targets: cross_entropy(x, targets, **options),
            lambda x, targets=targets: cross_entropy_reference(x, targets, **options),
            (make(n, v, dtype=dtype) * 3,),
        )


@DTYPES
def test_gradient_over_the_logits(compare: Any, dtype: torch.dtype) -> None:
    targets = targets_for(5, 70)
    written: list[Tensor] = []

    def ours(x: Tensor, w: Tensor) -> Tensor:
        logits = x @ w.t()
        written.append(logits)
        return cross_entropy(logits, targets, z_loss=1e-2, inplace=True)

    inputs = make(5, 9, dtype=dtype), make(70, 9, dtype=dtype, seed=1)
    compare.gradients(
        "cross_entropy", ours, lambda x, w: cross_entropy_reference(x @ w.t(), targets, z_loss=1e-2), inputs
    )
    (logits,) = written
    assert not logits[1].any()  # an ignored row
    assert bool((logits.float().sum(dim=1).abs() < 1).all())


def test_gradient_over_the_logits_is_taken_once() -> None:
    x = make(5, 70).requires_grad_()
    loss = cross_entropy(x * 1, targets_for(5, 70), inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_in_strange_places(compare: Any) -> None:
    wide = make(10, 70)
    targets = targets_for(5, 35)
    for view in (lambda x: x[::2, 5:40], lambda x: x[::2, ::2], lambda x: x[:5, :35].t().contiguous().t()):
        for inplace in (False, True):
            compare.gradients(
                "cross_entropy",
                lambda x, view=view, inplace=inplace: cross_entropy(view(x * 1), targets, inplace=inplace),
                lambda x, view=view: cross_entropy_reference(view(x), targets),
                (wide,),
            )


@DTYPES
@ALL_OPTIONS
@SHAPES
def test_linear_cross_entropy(
    compare: Any, shape: tuple[int, int, int], options: dict[str, Any], dtype: torch.dtype
) -> None:
    targets = targets_for(shape[0], shape[2], ignored(options))
    compare.gradients(
        "linear_cross_entropy",
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, chunk_rows=7, **options),
        lambda h, w, b: linear_cross_entropy_reference(h, w, targets, bias=b, **options),
        head(shape, dtype),
    )


@DTYPES
def test_weights_of_another_dtype(compare: Any, dtype: torch.dtype) -> None:
    other = torch.float16 if dtype == torch.float32 else torch.float32
    targets = targets_for(9, 70)
    hidden, weight, _ = head((9, 20, 70), dtype, other)
    compare.gradients(
        "linear_cross_entropy",
        lambda h, w: linear_cross_entropy(h, w, targets, chunk_rows=4),
        lambda h, w: linear_cross_entropy_reference(h, w, targets),
        (hidden, weight),
        exact=lambda h, w: linear_cross_entropy_reference(h, w.to(dtype).double(), targets),
    )


@DTYPES
@ALL_OPTIONS
@SHAPES
def test_without_gradients(
    compare: Any, shape: tuple[int, int, int], options: dict[str, Any], dtype: torch.dtype
) -> None:
    targets = targets_for(shape[0], shape[2], ignored(options))
    hidden, weight, bias = head(shape, dtype)
    double = (hidden.double(), weight.double())
    softcap, ignore_index = options.get("softcap"), ignored(options)
    with torch.no_grad():
        loss, log_probs = linear_cross_entropy_and_log_probs(hidden, weight, targets, bias=bias, **options)
    plain = linear_cross_entropy_reference(hidden, weight, targets, bias=bias, **options)
    exact = linear_cross_entropy_reference(*double, targets, bias=bias.double(), **options)
    compare.values("linear_cross_entropy", loss, plain, exact)
    some: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap}
    plain = token_log_probs_reference(hidden, weight, targets, bias=bias, **some)
    exact = token_log_probs_reference(*double, targets, bias=bias.double(), **some)
    compare.values("token_log_probs", log_probs, plain, exact)
    assert torch.equal(token_log_probs(hidden, weight, targets, bias=bias, **some), log_probs)


@DTYPES
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_log_probs(compare: Any, softcap: float | None, dtype: torch.dtype) -> None:
    targets = targets_for(9, 70)
    compare.gradients(
        "token_log_probs",
        lambda h, w, b: token_log_probs(h, w, targets, bias=b, softcap=softcap, chunk_rows=4),
        lambda h, w, b: token_log_probs_reference(h, w, targets, bias=b, softcap=softcap),
        head((9, 20, 70), dtype),
    )


@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_distillation(compare: Any, softcap: float | None, temperature: float, dtype: torch.dtype) -> None:
    n, c, v = 9, 20, 70
    teacher = [make(n, 11, dtype=dtype, seed=7), make(v, 11, dtype=dtype, seed=8) / 3, make(v, dtype=dtype, seed=9)]
    valid = torch.arange(n) % 4 != 1
    options: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "teacher_softcap": None if softcap is None else 5.0,
    }

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        from_hidden: dict[str, Any] = dict(
            zip(("teacher_hidden", "teacher_weight", "teacher_bias"), teacher, strict=True)
        )
        return linear_distillation(h, w, bias=b, valid=valid, chunk_rows=4, **from_hidden, **options)

    def plain(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        t, tw, tb = (x.to(h.dtype) for x in teacher)
        return distillation_reference(project(h, w, b), project(t, tw, tb), valid_N=valid, **options)

    compare.gradients("distillation", ours, plain, head((n, c, v), dtype))


@DTYPES
def test_distillation_from_logits(compare: Any, dtype: torch.dtype) -> None:
    for n, c, v in ((1, 4, 5), (5, 12, 64), (6, 9, 123)):
        logits = make(n, v, seed=6) * 2
        logits[:, 3] = float("-inf")  # what the teacher never says
        compare.gradients(
            "distillation",
            lambda h, w, t=logits: linear_distillation(h, w, teacher_logits=t, chunk_rows=2, temperature=0.7),
            lambda h, w, t=logits: distillation_reference(project(h, w, None), t, temperature=0.7),
            head((n, c, v), dtype)[:2],
            exact=lambda h, w, t=logits: distillation_reference(project(h, w, None), t.double(), temperature=0.7),
        )
    hidden, weight, _ = head((5, 12, 64), dtype)
    given = make(64, 5).t()
    with torch.no_grad():
        loss = linear_distillation(hidden, weight, teacher_logits=given)
        expected = distillation_reference(project(hidden, weight, None), given)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_nothing_flows_to_the_teacher() -> None:
    hidden, weight, _ = head((5, 12, 64), torch.float32)
    teacher = make(5, 64).requires_grad_()
    loss = linear_distillation(hidden.requires_grad_(), weight, teacher_logits=teacher)
    loss.backward()
    assert teacher.grad is None
    assert hidden.grad is not None
    same = linear_distillation(hidden, weight, teacher_hidden=hidden, teacher_weight=weight)
    assert abs(float(same.detach())) < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of inf - inf
def test_masked_vocabulary(compare: Any) -> None:
    """-inf logits have no probability; +inf and NaN make their row NaN and no other."""
    x = make(6, 70)
    x[:, 40:] = float("-inf")
    targets = targets_for(6, 40)
    compare.gradients(
        "cross_entropy", lambda x: cross_entropy(x, targets), lambda x: cross_entropy_reference(x, targets), (x,)
    )
    hidden, weight, bias = head((6, 9, 70), torch.float32)
    bias[40:] = float("-inf")
    compare.values(
        "token_log_probs",
        token_log_probs(hidden.half(), weight.half(), targets, bias=bias.half()),
        token_log_probs_reference(hidden.half(), weight.half(), targets, bias=bias.half()),
        token_log_probs_reference(hidden.double(), weight.double(), targets, bias=bias.double()),
    )
    for bad in (float("nan"), float("inf")):
        x = make(6, 70)
        x[2, 33] = bad
        _, log_probs = cross_entropy_and_log_probs(x, targets)
        assert torch.isnan(log_probs[2])
        assert torch.isfinite(log_probs[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("target", [70, 71, -1, -101, 2**40])
def test_target_out_of_range_makes_its_row_nan(target: int) -> None:
    targets = targets_for(6, 70)
    targets[2] = target
    others = [0, 1, 3, 4, 5]
    x = make(6, 70).requires_grad_()
    loss, log_probs = cross_entropy_and_log_probs(x, targets)
    loss.backward()
    assert x.grad is not None
    assert torch.isnan(x.grad[2]).all()
    assert torch.isfinite(x.grad[others]).all()
    hidden, weight, _ = head((6, 9, 70), torch.float16)
    in_parts = token_log_probs(hidden, weight, targets)
    linear_loss, in_chunks = linear_cross_entropy_and_log_probs(hidden.requires_grad_(), weight, targets, chunk_rows=4)
    linear_loss.backward()
    assert hidden.grad is not None
    assert torch.isnan(hidden.grad[2]).all()
    assert torch.isfinite(hidden.grad[others]).all()
    for values in (log_probs, in_parts, in_chunks):
        assert torch.isnan(values[2])
        assert torch.isfinite(values[others]).all()
    assert torch.isnan(loss)
    assert torch.isnan(linear_loss)


def test_log_probs_come_with_the_loss() -> None:
    hidden, weight, _ = head((9, 20, 70), torch.float32)
    targets = targets_for(9, 70)
    expected = token_log_probs_reference(hidden, weight, targets)
    loss, log_probs = linear_cross_entropy_and_log_probs(hidden.requires_grad_(), weight, targets, chunk_rows=4)
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(loss, -expected.sum())
    assert loss.requires_grad
    assert not log_probs.requires_grad


def test_empty() -> None:
    hidden, weight, bias = (x.requires_grad_() for x in head((0, 8, 12), torch.float32))
    none = torch.zeros(0, dtype=torch.int64)
    for loss in (
        linear_cross_entropy(hidden, weight, none, bias=bias),
        linear_distillation(hidden, weight, bias=bias, teacher_logits=torch.zeros(0, 12)),
        token_log_probs(hidden, weight, none, bias=bias).sum(),
    ):
        assert float(loss.detach()) == 0
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        assert [g.shape for g in gradients] == [(0, 8), (12, 8), (12,)]
        assert not any(g.any() for g in gradients)
    assert token_log_probs(hidden, weight, none).shape == (0,)
    x = torch.zeros(0, 5, requires_grad=True)
    cross_entropy(x, none).backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 5)


def test_only_needed_gradients_are_computed() -> None:
    tensors = head((9, 8, 35), torch.float32)
    targets = targets_for(9, 35)

    def loss(values: list[Tensor]) -> Tensor:
        hidden, weight, bias = values
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=4)

    full = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(full), full)
    for place, gradient in enumerate(expected):
        some = [t.clone().requires_grad_(i == place) for i, t in enumerate(tensors)]
        assert torch.equal(torch.autograd.grad(loss(some), some[place])[0], gradient)


def test_logits_are_never_whole() -> None:
    hidden, weight, _ = (x.requires_grad_() for x in head((24, 8, 200), torch.float32))
    teacher = make(24, 4)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor))
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, targets_for(24, 200), chunk_rows=8).backward()
        token_log_probs(hidden, weight, targets_for(24, 200), chunk_rows=8).sum().backward()
        options: dict[str, Any] = {"teacher_hidden": teacher, "teacher_weight": make(200, 4)}
        linear_distillation(hidden, weight, chunk_rows=8, **options).backward()
    assert max(seen) <= 8 * 224  # rows begin at multiples of 128 bytes


def test_registration() -> None:
    hidden, weight, bias = (x.requires_grad_() for x in head((5, 8, 35), torch.float32))
    targets = targets_for(5, 35)
    options = (-100, 0.1, 1e-3, 4.0)
    check = torch.library.opcheck
    check(linear_cross_entropy_forward, (hidden, weight, bias, targets, *options, 3, [True, True, True]))
    check(linear_cross_entropy_forward, (hidden, weight.detach(), None, targets, *options, 3, [True, False, False]))
    check(token_log_probs_forward, (hidden, weight, bias, targets, -100, None, 3))
    check(token_log_probs_forward, (hidden.detach().half(), weight.detach().half(), None, targets, -100, None, 3))
    check(cross_entropy_forward, (make(5, 35).requires_grad_(), targets, *options, False))
    teacher = (None, make(5, 3), make(35, 3), None, torch.ones(5, dtype=torch.bool))
    check(
        linear_distillation_forward,
        (hidden, weight, None, *teacher, 2.0, None, 5.0, 3, [True, True, False]),
    )


@pytest.mark.parametrize("kind", ["linear", "log-probs", "distillation", "logits", "inplace"])
def test_compiles_whole_and_under_checkpointing(kind: str) -> None:
    hidden, weight, _ = head((5, 8, 35), torch.float32)
    targets = targets_for(5, 35)

    def function(h: Tensor, w: Tensor) -> Tensor:
        h = h.square()
        if kind == "linear":
            return linear_cross_entropy(h, w, targets, chunk_rows=2)
        if kind == "log-probs":
            return token_log_probs(h, w, targets, chunk_rows=2).square().sum()
        if kind == "distillation":
            return linear_distillation(h, w, teacher_logits=h.detach() @ w.detach().t() * 2)
        return cross_entropy(h @ w.t(), targets, inplace=kind == "inplace")

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(a, b)
    again = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again, leaves), expected, strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused_before_launch() -> None:
    hidden, weight, _ = head((5, 8, 35), torch.float64)
    targets = targets_for(5, 35)
    for call in (
        lambda: linear_cross_entropy(hidden, weight, targets),
        lambda: token_log_probs(hidden, weight, targets),
        lambda: cross_entropy(hidden @ weight.t(), targets),
        lambda: linear_distillation(hidden.float(), weight, teacher_logits=hidden @ weight.t()),
    ):
        with pytest.raises(ValueError, match="float64 is not supported"):
            call()
