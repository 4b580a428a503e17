"""Cross-entropy and distillation on a GPU at real sizes, against float64 on the same GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.cross_entropy.distillation import linear_distillation
from trine.kernels.cross_entropy.logits import cross_entropy, cross_entropy_and_log_probs
from trine.kernels.cross_entropy.op import linear_cross_entropy, linear_cross_entropy_and_log_probs
from trine.kernels.cross_entropy.reference import (
    cross_entropy_reference,
    distillation_reference,
    linear_cross_entropy_reference,
    project,
    token_log_probs_reference,
)
from trine.kernels.cross_entropy.token_log_probs import token_log_probs

# Norm of the error over that of the exact values: of the loss and of gradients.
BOUNDS = {torch.float32: (1e-5, 3e-5), torch.bfloat16: (2e-3, 2e-2), torch.float16: (3e-4, 3e-3)}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "ignore_index": 4},
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
GOAL = (8192, 4096, 128256)
SLACK = 80 * 2**20  # workspaces of the libraries, statistics of rows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def head(shape: tuple[int, int, int], dtype: torch.dtype, weights: torch.dtype | None = None) -> list[Tensor]:
    """hidden, weight and bias, of logits of a few units."""
    n, c, v = shape
    kind = weights or dtype
    weight = (random(v, c, seed=1) * (2 / c**0.5)).to(kind)
    return [x.requires_grad_() for x in (random(n, c).to(dtype), weight, random(v, seed=2).to(kind))]


def targets_for(n: int, v: int, ignore_index: int = -100) -> Tensor:
    targets = torch.randint(v, (n,), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    targets[1::5] = ignore_index
    targets[::7] = v - 1
    return targets


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The loss, and the gradients of 0.37 times the loss."""
    loss = function(*tensors)
    return [loss.detach(), *torch.autograd.grad(loss.sum() * 0.37, tensors)]


def check(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype, factor: float = 1.0) -> None:
    for place, (a, b) in enumerate(zip(map(Tensor.detach, found), map(Tensor.detach, exact), strict=True)):
        assert torch.isfinite(a).all(), f"result {place} is not finite"
        # One row's loss may be near 0 while its logits are not.
        size = b.norm() + (b.numel() ** 0.5 if place == 0 else 0)
        error = float((a.double() - b).norm() / size)
        assert error <= factor * BOUNDS[dtype][place > 0], f"result {place}: relative error {error:.2e}"


@contextmanager
def allocating_at_most(limit: int) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    assert used <= limit, f"{used / 2**20:.0f} MiB at the peak, at most {limit / 2**20:.0f} allowed"


def needs_memory(size: float) -> None:
    if torch.cuda.get_device_properties(0).total_memory < size:
        pytest.skip(f"needs {size / 1e9:.0f} GB of GPU memory")


@DTYPES
@ALL_OPTIONS
@pytest.mark.parametrize("shape", [(2100, 1024, 32000), (1030, 768, 50257)], ids=str)
def test_linear_cross_entropy(shape: tuple[int, int, int], options: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = head(shape, dtype)
    targets = targets_for(shape[0], shape[2], options.get("ignore_index", -100))
    found = run(lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, chunk_rows=512, **options), tensors)
    exact = run(lambda h, w, b: linear_cross_entropy_reference(h, w, targets, bias=b, **options), double(tensors))
    assert [g.dtype for g in found[1:]] == [t.dtype for t in tensors]
    check(found, exact, dtype)
    with torch.no_grad():
        hidden, weight, bias = tensors
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, **options)
    # Without gradients logits are not rounded to half precision.
    assert abs(float(loss) / float(exact[0]) - 1) < 1e-5


@DTYPES
@pytest.mark.parametrize("shape", [(1, 8, 3), (5, 123, 33), (129, 72, 1000), (65, 33, 4097), (0, 64, 32)], ids=str)
def test_odd_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors = head(shape, dtype)
    targets = torch.randint(shape[2], shape[:1], device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    pairs: tuple[tuple[Any, Any], ...] = (
        (linear_cross_entropy, linear_cross_entropy_reference),
        (token_log_probs, token_log_probs_reference),
    )
    for function, reference in pairs:
        found = run(lambda h, w, b, f=function: f(h, w, targets, bias=b), tensors)
        if not shape[0]:
            assert not any(x.any() for x in found)
            continue
        exact = run(lambda h, w, b, f=reference: f(h, w, targets, bias=b), double(tensors))
        check(found, exact, dtype, factor=10)  # errors of few numbers do not even out


def test_weights_in_fp32_get_gradients_in_fp32() -> None:
    hidden, weight, _ = head((4096, 1024, 32000), torch.bfloat16, torch.float32)
    targets = targets_for(4096, 32000)
    found = run(lambda h, w: linear_cross_entropy(h, w, targets), [hidden, weight])
    rounded = [hidden, weight.detach().bfloat16()]
    check(found, run(lambda h, w: linear_cross_entropy_reference(h, w, targets), double(rounded)), torch.bfloat16)
    assert found[2].dtype == torch.float32
    assert not torch.equal(found[2].bfloat16().float(), found[2])


def test_goal_shape_never_holds_the_logits() -> None:
    needs_memory(70e9)
    n, c, v = GOAL
    hidden, weight, _ = head(GOAL, torch.bfloat16)
    targets = targets_for(n, v)
    few = hidden[:64].detach().requires_grad_()
    run(lambda h, w: linear_cross_entropy(h, w, targets[:64]), [few, weight])  # warm
    chunk = 2048 * v * 2
    # dweight in fp32 and scaled, dhidden likewise.
    with allocating_at_most(chunk + 6 * c * v + 6 * n * c + SLACK):
        found = run(lambda h, w: linear_cross_entropy(h, w, targets), [hidden, weight])
    with allocating_at_most(chunk + 6 * n * c + SLACK):
        run(lambda h: linear_cross_entropy(h, weight.detach(), targets), [hidden])
    assert chunk + 6 * n * c + SLACK < n * v * 2 / 2  # half of the logits
    exact_hidden, exact_weight = double([hidden, weight])
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    for start in range(0, n, 1024):
        rows = slice(start, start + 1024)
        loss = linear_cross_entropy_reference(exact_hidden[rows], exact_weight, targets[rows])
        (loss * 0.37).backward()
        total += loss.detach()
    assert exact_hidden.grad is not None
    assert exact_weight.grad is not None
    check(found, [total, exact_hidden.grad, exact_weight.grad], torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_evaluation_holds_no_logits_and_does_not_round_them(dtype: torch.dtype) -> None:
    needs_memory(40e9)
    n, _, v = GOAL
    hidden, weight, bias = (t.detach() for t in head(GOAL, dtype))
    targets = targets_for(n, v)
    token_log_probs(hidden[:64], weight, targets[:64], bias=bias)
    with allocating_at_most(32 * 2**20):
        found = token_log_probs(hidden, weight, targets, bias=bias)
    rows = torch.arange(0, n, 16, device="cuda")
    exact = token_log_probs_reference(hidden[rows].double(), weight.double(), targets[rows], bias=bias.double())
    assert float((found[rows].double() - exact).abs().max()) < 2e-4
    with torch.no_grad():
        _, log_probs = linear_cross_entropy_and_log_probs(hidden, weight, targets, bias=bias)
    assert torch.equal(log_probs, found)


def test_token_log_probs_with_gradients() -> None:
    tensors = head((3000, 512, 32000), torch.float32)
    targets = targets_for(3000, 32000)
    factors = random(3000, seed=9)
    found = run(lambda h, w, b: token_log_probs(h, w, targets, bias=b, softcap=5.0) * factors, tensors)
    exact = run(
        lambda h, w, b: token_log_probs_reference(h, w, targets, bias=b, softcap=5.0) * factors, double(tensors)
    )
    check(found, exact, torch.float32)


@DTYPES
@ALL_OPTIONS
@pytest.mark.parametrize("vocab_size", [320, 50257, 262144])
def test_cross_entropy_of_logits(vocab_size: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    targets = targets_for(300, vocab_size, options.get("ignore_index", -100))
    logits = [(random(300, vocab_size) * 3).to(dtype).requires_grad_()]
    exact = run(lambda x: cross_entropy_reference(x, targets, **options), double(logits))
    loss, dlogits = run(lambda x: cross_entropy(x, targets, **options), logits)
    assert abs(float(loss) / float(exact[0]) - 1) < 1e-5
    check([loss, dlogits], exact, dtype)
    in_place = run(lambda x: cross_entropy(x * 1, targets, inplace=True, **options), logits)
    assert torch.equal(in_place[1], dlogits)


def test_logits_past_2_to_the_31() -> None:
    needs_memory(30e9)
    n, v = 16400, 131072
    assert n * v > 2**31
    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = targets_for(n, v)
    last = logits[-40:].detach().double().requires_grad_()
    (dlast,) = torch.autograd.grad(cross_entropy_reference(last, targets[-40:], z_loss=1e-3), last)
    plain = cross_entropy_reference(last, targets[-40:]).detach()
    loss, log_probs = cross_entropy_and_log_probs(logits, targets, z_loss=1e-3)
    (dlogits,) = torch.autograd.grad(loss, logits)
    check([-log_probs[-40:].sum(), dlogits[-40:]], [plain, dlast], torch.bfloat16)
    del dlogits
    with allocating_at_most(SLACK):
        loss = cross_entropy(logits.view(n, v), targets, z_loss=1e-3, inplace=True)
        (dlogits,) = torch.autograd.grad(loss, logits)
    assert dlogits.data_ptr() == logits.data_ptr()
    check([loss.detach(), dlogits[-40:]], [loss.detach().double(), dlast], torch.bfloat16)


def test_chunks_and_weights_past_2_to_the_31() -> None:
    needs_memory(60e9)
    n, c, v = 16400, 64, 131072
    hidden, weight, _ = head((n, c, v), torch.bfloat16)
    targets = targets_for(n, v)
    found = run(lambda h: linear_cross_entropy(h, weight.detach(), targets, chunk_rows=n), [hidden])
    last = [hidden[-40:]]
    exact = run(lambda h: linear_cross_entropy_reference(h, weight.detach().double(), targets[-40:]), double(last))
    check([found[1][-40:]], [exact[1]], torch.bfloat16)
    c, v = 8256, 262147
    assert c * v > 2**31
    weight = torch.randn(v, c, device="cuda", dtype=torch.bfloat16).mul_(2 / c**0.5)
    hidden = random(48, c, seed=4).bfloat16()
    targets = torch.randint(v - 3000, v, (48,), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    log_probs = token_log_probs(hidden, weight, targets)
    logits = torch.cat([hidden.double() @ part.double().t() for part in weight.split(32768)], dim=1)
    expected = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
    assert float((log_probs.double() - expected).abs().max()) < 2e-4


@DTYPES
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_distillation(softcap: float | None, dtype: torch.dtype) -> None:
    n, c, v = 2100, 768, 32000
    tensors = head((n, c, v), dtype)
    teacher, teacher_weight, teacher_bias = (t.detach() for t in head((n, 1024, v), dtype))
    valid = torch.arange(n, device="cuda") % 5 != 1
    options: dict[str, Any] = {"temperature": 2.0, "softcap": softcap, "teacher_softcap": softcap}
    given: dict[str, Any] = {"teacher_hidden": teacher, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    found = run(lambda h, w, b: linear_distillation(h, w, bias=b, valid=valid, **given, **options), tensors)
    logits = project(teacher.double(), teacher_weight.double(), teacher_bias.double())
    exact = run(
        lambda h, w, b: distillation_reference(project(h, w, b), logits, valid_N=valid, **options), double(tensors)
    )
    check(found, exact, dtype)
    again = run(
        lambda h, w, b: linear_distillation(h, w, bias=b, valid=valid, teacher_logits=logits.float(), **options),
        tensors,
    )
    check(again, exact, dtype)


@DTYPES
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    tensors = head((3000, 1024, 32003), dtype)
    targets = targets_for(3000, 32003)
    teacher = random(3000, 32003, seed=8)
    functions: tuple[Callable[..., Tensor], ...] = (
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, chunk_rows=1024),
        lambda h, w, b: token_log_probs(h, w, targets, bias=b, chunk_rows=1024),
        lambda h, w, b: linear_distillation(h, w, bias=b, teacher_logits=teacher, chunk_rows=1024),
        lambda h, w, b: cross_entropy(project(h, w, b), targets, inplace=True),
    )
    for function in functions:
        for a, b in zip(run(function, tensors), run(function, tensors), strict=True):
            assert torch.equal(a, b)


def test_target_out_of_range_makes_its_row_nan_without_waiting() -> None:
    hidden, weight, _ = head((600, 256, 32000), torch.bfloat16)
    targets = targets_for(600, 32000)
    targets[7], targets[300], targets[599] = 32000, -1, 2**40
    good = torch.ones(600, dtype=torch.bool, device="cuda")
    good[torch.tensor([7, 300, 599], device="cuda")] = False
    logits = project(hidden, weight, None).detach().requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()  # compiles
    cross_entropy(logits, targets).backward()
    token_log_probs(hidden, weight, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, log_probs = linear_cross_entropy_and_log_probs(hidden, weight, targets)
        loss, of_logits = cross_entropy_and_log_probs(logits, targets)
        (dlogits,) = torch.autograd.grad(loss, logits)
        alone = token_log_probs(hidden, weight, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for values in (log_probs, of_logits, alone, dlogits):
        assert torch.isnan(values[~good]).all()
        assert torch.isfinite(values[good]).all()
