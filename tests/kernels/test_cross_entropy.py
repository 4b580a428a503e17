"""The losses on a CPU equal their references in float64, whatever the chunk size; and the launch configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cross_entropy.distillation import linear_distillation
from trine.kernels.cross_entropy.divergence import DISTILLATION_ROWS
from trine.kernels.cross_entropy.logits import cross_entropy, cross_entropy_and_log_probs
from trine.kernels.cross_entropy.op import linear_cross_entropy, linear_cross_entropy_and_log_probs
from trine.kernels.cross_entropy.options import default_chunk_rows
from trine.kernels.cross_entropy.projection import PARTS, shared_estimate
from trine.kernels.cross_entropy.reference import (
    cross_entropy_reference,
    distillation_reference,
    linear_cross_entropy_reference,
    project,
    token_log_probs_reference,
)
from trine.kernels.cross_entropy.rows import ROWS
from trine.kernels.cross_entropy.token_log_probs import token_log_probs
from trine.kernels.target import COMPILED, INTERPRETER

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 2.0},
    "all": {"label_smoothing": 0.3, "z_loss": 3e-2, "softcap": 3.0},
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def _inputs(N: int, C: int, V: int, *, ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N + V)
    hidden = torch.randn(N, C, generator=generator)
    weight = torch.randn(V, C, generator=generator) / C**0.5 * 3
    bias = torch.randn(V, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    return hidden, weight, bias, targets


def _gradients(function: Any, leaves: list[Tensor], factor: float = 0.37) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss = function(*leaves)
    return (loss.detach(), *torch.autograd.grad(loss.sum() * factor, leaves))


def _check(ours: Any, exact: Any, leaves: list[Tensor]) -> None:
    for one, two in zip(_gradients(ours, leaves), _gradients(exact, [x.double() for x in leaves]), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000, None])
@pytest.mark.parametrize(("N", "C", "V"), [(1, 8, 5), (123, 16, 33)])
@ALL_OPTIONS
def test_value_and_gradients_equal_float64(
    N: int, C: int, V: int, chunk_rows: int | None, biased: bool, options: dict[str, Any]
) -> None:
    hidden, weight, bias, targets = _inputs(N, C, V)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=chunk_rows, **options)

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy_reference(hidden, weight, targets, bias=bias, **options)

    leaves = [hidden, weight, bias] if biased else [hidden, weight]
    _check(ours, exact, leaves)
    with torch.no_grad():
        torch.testing.assert_close(ours(*leaves), exact(*leaves))


@ALL_OPTIONS
def test_loss_of_logits_equals_float64(options: dict[str, Any]) -> None:
    logits, targets = torch.randn(300, 33, generator=torch.Generator().manual_seed(1)) * 3, _inputs(300, 8, 33)[3]
    for inplace in (False, True):
        _check(
            lambda x, inplace=inplace: cross_entropy(x * 1, targets, inplace=inplace, **options),
            lambda x: cross_entropy_reference(x, targets, **options),
            [logits],
        )
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, targets[:5], **options), [logits[:5].double().requires_grad_()]
    )


def test_reference_is_torch() -> None:
    """Without z-loss and softcap torch has the loss; with them it is written out."""
    logits, targets = torch.randn(9, 33, generator=torch.Generator().manual_seed(1)).double(), _inputs(9, 8, 33)[3]
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(cross_entropy_reference(logits, targets, label_smoothing=0.2), expected)
    torch.testing.assert_close(cross_entropy(logits, targets, label_smoothing=0.2), expected)
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        s = 2 * torch.tanh(torch.tensor(row, dtype=torch.float64) / 2)
        lse = s.exp().sum().log()
        total += 0 if target == -100 else lse - s[target] + 0.3 * lse**2
    torch.testing.assert_close(cross_entropy_reference(logits, targets, z_loss=0.3, softcap=2.0), total)


def test_gradient_over_the_logits() -> None:
    x = torch.randn(7, 12, requires_grad=True)
    targets = _inputs(7, 8, 12)[3]
    logits = x * 1
    cross_entropy(logits, targets, inplace=True).backward()
    assert x.grad is not None
    assert torch.equal(logits, x.grad)
    with pytest.raises(ValueError, match="leaf"):
        cross_entropy(x, targets, inplace=True)
    with pytest.raises(ValueError, match="expanded"):
        cross_entropy((x[:1] * 1).expand(7, 12), targets, inplace=True)
    loss = cross_entropy(x * 1, targets, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bfloat16_hidden_with_float32_weight() -> None:
    hidden, weight, _, targets = _inputs(64, 32, 50)
    results = {}
    for chunk_rows in (16, 64):
        results[chunk_rows] = _gradients(
            lambda h, w, rows=chunk_rows: linear_cross_entropy(h, w, targets, chunk_rows=rows),
            [hidden.bfloat16(), weight],
        )
    loss, dhidden, dweight = results[16]
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    exact = _gradients(
        lambda h, w: linear_cross_entropy_reference(h, w, targets), [hidden.bfloat16().double(), weight.double()]
    )
    for one, two in zip((loss, dhidden, dweight), exact, strict=True):
        relative = float((one.double() - two).norm() / two.norm())
        assert relative < 1e-2
    # Chunking changes only where partial sums of dweight are rounded to bf16.
    assert torch.equal(results[16][1], results[64][1])
    torch.testing.assert_close(results[16][0], results[64][0], rtol=1e-6, atol=0)


def test_whole_vocabulary_of_logits_is_never_held() -> None:
    hidden, weight, _, targets = _inputs(256, 8, 4096)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                seen.append(out.numel())
            return out

    with Watch():
        _gradients(lambda h, w: linear_cross_entropy(h, w, targets, chunk_rows=16), [hidden, weight])
        _gradients(lambda h, w: token_log_probs(h, w, targets, chunk_rows=16), [hidden, weight])
        teacher: dict[str, Any] = {"teacher_hidden": hidden, "teacher_weight": weight, "chunk_rows": 16}
        _gradients(lambda h, w: linear_distillation(h, w, **teacher), [hidden, weight])
    assert max(seen) <= 16 * 4096


def test_only_wanted_gradients_are_computed() -> None:
    hidden, weight, _, targets = _inputs(10, 8, 12)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, targets))


def test_all_targets_ignored_is_zero() -> None:
    hidden, weight, _, targets = _inputs(5, 8, 12, ignored=1.1)
    loss, dhidden, dweight = _gradients(lambda h, w: linear_cross_entropy(h, w, targets, z_loss=0.1), [hidden, weight])
    assert float(loss) == 0
    assert not dhidden.any()
    assert not dweight.any()


@pytest.mark.parametrize("chunk_rows", [1, 10, None])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_log_probs_equal_float64(softcap: float | None, chunk_rows: int | None) -> None:
    hidden, weight, bias, targets = _inputs(33, 16, 21)
    log_probs = token_log_probs(hidden, weight, targets, bias=bias, chunk_rows=chunk_rows, softcap=softcap)
    assert log_probs.shape == (33,)
    assert log_probs.dtype == torch.float32
    assert bool((log_probs[targets == -100] == 0).all())
    _check(
        lambda h, w, b: token_log_probs(h, w, targets, bias=b, chunk_rows=chunk_rows, softcap=softcap),
        lambda h, w, b: token_log_probs_reference(h, w, targets, bias=b, softcap=softcap),
        [hidden, weight, bias],
    )
    assert token_log_probs(hidden[:0], weight, targets[:0]).shape == (0,)
    with_loss = linear_cross_entropy_and_log_probs(hidden, weight, targets, bias=bias, softcap=softcap)
    torch.testing.assert_close(with_loss[1], log_probs)
    torch.testing.assert_close(with_loss[0], -log_probs.sum())
    logits = project(hidden, weight, bias)
    torch.testing.assert_close(cross_entropy_and_log_probs(logits, targets, softcap=softcap)[1], log_probs)


@pytest.mark.parametrize("chunk_rows", [1, 10, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_distillation_equals_float64(softcap: float | None, temperature: float, chunk_rows: int | None) -> None:
    hidden, weight, bias, targets = _inputs(33, 16, 21)
    teacher, teacher_weight, teacher_bias, _ = _inputs(33, 7, 21)
    valid = targets != -100
    options: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "teacher_softcap": softcap}

    def exact(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logits = project(teacher.double(), teacher_weight, teacher_bias)
        return distillation_reference(project(h, w, b), logits, valid_N=valid, **options)

    given: list[dict[str, Any]] = [
        {"teacher_hidden": teacher, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias},
        {"teacher_logits": project(teacher, teacher_weight, teacher_bias).requires_grad_()},
    ]
    for some in given:
        _check(
            lambda h, w, b, some=some: linear_distillation(
                h, w, bias=b, valid=valid, chunk_rows=chunk_rows, **some, **options
            ),
            exact,
            [hidden, weight, bias],
        )
    s, t = (
        torch.log_softmax(x / temperature, -1) for x in (project(hidden, weight, None), project(hidden, weight, bias))
    )
    found = linear_distillation(hidden, weight, teacher_logits=project(hidden, weight, bias), temperature=temperature)
    torch.testing.assert_close(found, temperature**2 * F.kl_div(s, t, reduction="sum", log_target=True))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": zeros(12, 7)}, r"hidden \(5, 8\) and weight \(12, 7\) do not fit; expected \[N, C\] and \[V, C\]"),
        ({"hidden": zeros(1, 5, 8)}, "do not fit"),
        ({"weight": zeros(0, 8)}, "must not be empty"),
        ({"weight": zeros(12, 8, dtype=torch.int32)}, "weight is torch.int32"),
        ({"targets": zeros(4, dtype=torch.int64)}, r"targets \(4,\) do not fit; expected \[5\]"),
        ({"targets": zeros(5, dtype=torch.int32)}, "targets are torch.int32; they must be int64"),
        ({"targets": torch.tensor([0, 1, 12, 3, 4])}, "a target is 12; it must be from 0 to 11, or ignore_index"),
        ({"targets": torch.tensor([0, -100, 1, -1, 4])}, "a target is -1; .* ignore_index, which is -100"),
        ({"bias": zeros(8)}, r"bias has shape \(8,\); expected \(12,\)"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must be from 0 to 1"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be positive"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"hidden": zeros(5, 8), "weight": zeros(12, 8), "targets": zeros(5, dtype=torch.int64)}
    given |= changed
    tensors = [given.pop(name) for name in ("hidden", "weight", "targets")]
    for function in (linear_cross_entropy, token_log_probs):
        if function is linear_cross_entropy or not given.keys() & {"label_smoothing", "z_loss"}:
            with pytest.raises(ValueError, match=message):
                function(*tensors, **given)  # type: ignore[operator]


def test_bad_logits_are_refused() -> None:
    targets = zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits have shape \(5,\)"):
        cross_entropy(zeros(5), targets)
    with pytest.raises(ValueError, match=r"logits are torch\.int64"):
        cross_entropy(zeros(5, 3, dtype=torch.int64), targets)
    with pytest.raises(ValueError, match="a target is 3"):
        cross_entropy(zeros(5, 3), targets + 3)
    assert float(cross_entropy(zeros(5, 3), targets + 3, ignore_index=3)) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "the teacher is missing"),
        ({"teacher_hidden": zeros(5, 4)}, "the teacher is missing"),
        ({"teacher_logits": zeros(5, 12), "teacher_hidden": zeros(5, 4)}, "given twice"),
        ({"teacher_logits": zeros(5, 11)}, r"teacher_logits is torch.float32 \(5, 11\).*\[5, 12\]"),
        ({"teacher_hidden": zeros(5, 4), "teacher_weight": zeros(12, 3)}, "teacher_hidden .* do not fit"),
        ({"teacher_hidden": zeros(4, 4), "teacher_weight": zeros(12, 4)}, "for the student's rows and vocabulary"),
        ({"teacher_logits": zeros(5, 12), "temperature": 0.0}, "temperature is 0.0"),
        ({"teacher_logits": zeros(5, 12), "valid": zeros(5)}, "valid is torch.float32"),
        ({"teacher_logits": zeros(5, 12), "teacher_softcap": -2.0}, "teacher_softcap is -2.0"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_distillation_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_distillation(zeros(5, 8), zeros(12, 8), **changed)


def test_chunks_keep_their_bound() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert default_chunk_rows(2**18, torch.bfloat16, cpu) == 32
    for dtype in (torch.float32, torch.bfloat16):
        for vocab_size in (1, 1000, 32000, 50257, 128256, 262144, 2**30):
            rows = default_chunk_rows(vocab_size, dtype, gpu)
            assert 1 <= rows <= 2048
            assert rows == 1 or rows * vocab_size * dtype.itemsize <= 2**30
    assert default_chunk_rows(131072, torch.bfloat16, gpu) == 2048


@pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 320, 32000, 50257, 262144])
def test_configurations_fit(vocab_size: int, dtype: torch.dtype, target: Any) -> None:
    for tunable in (ROWS, DISTILLATION_ROWS):
        config = tunable.pick(dtype, target, V=vocab_size)
        block = config.blocks["BLOCK_V"]
        assert block & (block - 1) == 0
        if not target.interpreted:
            assert config.num_warps in (4, 8, 16)
            assert block // (config.num_warps * (64 if target.is_amd else 32)) <= 16
            assert tunable.candidates({"V": vocab_size}, dtype, target)
    for rows in (0, 1, 16, 100, 8192, 10**6):
        for extras in (0, 1):
            shape = {"N": rows, "V": vocab_size, "C": 4096, "exact_extras": extras}
            config = PARTS.pick(dtype, target, **shape)
            assert all(size & (size - 1) == 0 for size in config.blocks.values())
            assert all(config.blocks[name] >= 16 for name in ("ROWS", "COLUMNS", "BLOCK_C"))
            assert shared_estimate(config, dtype) <= target.shared_bytes
            if not target.interpreted and dtype != torch.float32:
                assert all(
                    shared_estimate(c, dtype) <= target.shared_bytes for c in PARTS.candidates(shape, dtype, target)
                )
