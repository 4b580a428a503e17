"""The AdamW kernel in the interpreter."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels import multi_tensor
from trine.kernels.adamw.formula import adamw_reference
from trine.kernels.adamw.op import adamw, adamw_step
from trine.kernels.adamw.optimizer import AdamW
from trine.kernels.adamw.rounding import FOR_MOMENTS, FOR_PARAMETER, GROUP, draws, round_stochastically
from trine.kernels.adamw.states import RATIO, decode, empty_states, encode_first, encode_second

DTYPES = [torch.float32, torch.bfloat16]
PARAMETERS = pytest.mark.parametrize("dtype", DTYPES, ids=str)
GRADIENTS = pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
# A chunk is one group of 2048 numbers: below, exactly one, and a few beyond.
SHAPES = ((5,), (GROUP,), (3, GROUP // 2 + 1))
# Powers of two: decay and steps are exact in fp32, so that equal formulas give equal bits.
FORMULA: dict[str, Any] = {"betas": (0.875, 0.9375), "eps": 2.0**-20}
LR, DECAY = 2.0**-6, 0.25


def make(seed: int, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(dtype: torch.dtype, gradient_dtype: torch.dtype, steps: int, **options: Any) -> AdamW:
    decays = [DECAY] * (len(SHAPES) - 1) + [0.0]
    optimizer = AdamW(make(0, dtype), weight_decay=decays, **{**FORMULA, **options})
    for update in range(1, steps + 1):
        optimizer.step(LR, update=update, gradients=make(update, gradient_dtype), grad_scale=torch.tensor(0.5))
    return optimizer


def expected(gradient_dtype: torch.dtype, start: list[Tensor], steps: int, work: torch.dtype) -> list[list[Tensor]]:
    """Parameters, m and v by the reference in `work`, without rounding between steps."""
    states = [[w.to(work), torch.zeros_like(w, dtype=work), torch.zeros_like(w, dtype=work)] for w in start]
    for update in range(1, steps + 1):
        for place, gradient in enumerate(make(update, gradient_dtype)):
            decay = DECAY if place < len(SHAPES) - 1 else 0.0
            states[place] = list(
                adamw_reference(
                    states[place][0], gradient.to(work) * 0.5, *states[place][1:],
                    lr=LR, weight_decay=decay, update=update, **FORMULA,
                )
            )  # fmt: skip
    return states


@GRADIENTS
def test_fp32(compare: Any, gradient_dtype: torch.dtype) -> None:
    optimizer = run(torch.float32, gradient_dtype, 2)
    start = make(0, torch.float32)
    plain, exact = (expected(gradient_dtype, start, 2, work) for work in (torch.float32, torch.float64))
    found = zip(optimizer.parameters, optimizer.first_moments, optimizer.second_moments, strict=True)
    for ours, theirs, double in zip(found, plain, exact, strict=True):
        for a, b, c in zip(ours, theirs, double, strict=True):
            compare.values("adamw", a, b, c)


@GRADIENTS
def test_bf16_rounded_to_nearest(compare: Any, gradient_dtype: torch.dtype) -> None:
    optimizer = run(torch.bfloat16, gradient_dtype, 1, stochastic_rounding=False)
    exact = expected(gradient_dtype, make(0, torch.bfloat16), 1, torch.float64)
    plain = expected(gradient_dtype, make(0, torch.bfloat16), 1, torch.float32)
    for a, (b, *_), (c, *_) in zip(optimizer.parameters, plain, exact, strict=True):
        compare.values("adamw bf16", a, b.bfloat16(), c)
        assert torch.equal(a, b.bfloat16())


@GRADIENTS
def test_bf16_rounded_stochastically_has_the_bits_of_the_torch_path(gradient_dtype: torch.dtype) -> None:
    optimizer = run(torch.bfloat16, gradient_dtype, 1, seed=2**40 + 3)
    plain = expected(gradient_dtype, make(0, torch.bfloat16), 1, torch.float32)
    for place, (found, (w, m, v)) in enumerate(zip(optimizer.parameters, plain, strict=True)):
        drawn = draws(w.numel(), w.device, seed=2**40 + 3, tensor=place, update=1, purpose=FOR_PARAMETER)
        assert torch.equal(found, round_stochastically(w, drawn.view(w.shape)))
        assert torch.equal(optimizer.first_moments[place], m)
        assert torch.equal(optimizer.second_moments[place], v)


@PARAMETERS
@GRADIENTS
def test_8_bit_states_are_those_of_the_torch_path(gradient_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """But for the last bit of logarithms, which may move a number by a level once in many thousands."""
    optimizer = run(dtype, gradient_dtype, 1, state_dtype=torch.int8, seed=3)
    plain = expected(gradient_dtype, make(0, dtype), 1, torch.float32)
    for place, (_, m, v) in enumerate(plain):
        drawn = draws(m.numel(), m.device, seed=3, tensor=place, update=1, purpose=FOR_MOMENTS)
        for ours, scales, (codes, expected_scales) in (
            (optimizer.first_moments[place], optimizer.first_scales[place], encode_first(m.view(-1), drawn)),
            (optimizer.second_moments[place], optimizer.second_scales[place], encode_second(v.view(-1), drawn)),
        ):
            assert torch.equal(scales, expected_scales)
            assert int((ours.int() - codes.int()).abs().max()) <= 1
            assert float((ours != codes).double().mean()) < 1e-3


def test_8_bit_states_follow_float64() -> None:
    optimizer = run(torch.float32, torch.float32, 3, state_dtype=torch.int8)
    exact = expected(torch.float32, make(0, torch.float32), 3, torch.float64)
    for place, (w, m, v) in enumerate(exact):
        first = decode(optimizer.first_moments[place], optimizer.first_scales[place]).double()
        second = decode(optimizer.second_moments[place], optimizer.second_scales[place]).double()
        assert float((second / v.view(-1) - 1).abs().max()) < 3 * (RATIO - 1)
        assert float((first - m.view(-1)).abs().max()) < 3 * (RATIO - 1) * float(m.abs().max())
        # Three updates of about the learning rate, each with m and sqrt(v) off by a level.
        assert float((optimizer.parameters[place].double() - w).abs().max()) < 3 * LR * 2 * (RATIO - 1)
        assert optimizer.parameters[place].shape == SHAPES[place]


def test_tensors_that_move_or_lie_askew_are_found() -> None:
    base = make(0, torch.float32, ((4200,),))[0]
    one = AdamW([base.clone()[:4100]], weight_decay=DECAY, **FORMULA)
    askew = torch.zeros(4103)
    askew[3:] = base[:4100]
    two = AdamW([askew[3:]], weight_decay=DECAY, **FORMULA)
    for update in (1, 2):
        gradient = make(update, torch.float32, ((4100, 2),))[0]
        one.step(LR, update=update, gradients=[gradient[:, 0].clone()])
        two.step(LR, update=update, gradients=[gradient[:, 0]])
    assert torch.equal(one.parameters[0], two.parameters[0])
    assert not askew[:3].any()


def test_dtypes_mixed_in_one_list() -> None:
    weights = [make(0, dtype, ((70,),))[0] for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    alone = [AdamW([w.clone()], weight_decay=DECAY, **FORMULA) for w in weights]
    together = AdamW(weights, weight_decay=DECAY, **FORMULA, stochastic_rounding=False)
    gradients = [make(place + 1, w.dtype, ((70,),))[0] for place, w in enumerate(weights)]
    together.step(LR, update=1, gradients=gradients)
    for one, gradient in zip(alone, gradients, strict=True):
        one.stochastic_rounding = False
        one.step(LR, update=1, gradients=[gradient])
    assert all(torch.equal(one.parameters[0], w) for one, w in zip(alone, together.parameters, strict=True))


def test_nan_and_infinity_travel() -> None:
    weights = [torch.ones(300, dtype=dtype) for dtype in DTYPES]
    gradients = [torch.ones_like(w) for w in weights]
    for gradient in gradients:
        gradient[7] = float("nan")
    AdamW(weights, weight_decay=0.0, **FORMULA).step(LR, update=1, gradients=gradients)
    for w in weights:
        assert math.isnan(w[7])
        assert torch.isfinite(w).sum() == 299


def test_empty_parameters() -> None:
    weights = [torch.zeros(0, 3), torch.ones(2)]
    AdamW(weights, weight_decay=0.0, **FORMULA).step(LR, update=1, gradients=[torch.zeros(0, 3), torch.ones(2)])
    assert (weights[1] < 1).all()
    AdamW(weights[:1], weight_decay=0.0, **FORMULA).step(LR, update=1, gradients=[torch.zeros(0, 3)])


def test_a_missing_gradient_is_refused_before_launch() -> None:
    weights = torch.ones(2)
    with pytest.raises(ValueError, match=r"parameter 0, of shape \(2,\), has no gradient"):
        AdamW([weights], weight_decay=0.0, **FORMULA).step(LR, update=1)
    assert torch.equal(weights, torch.ones(2))


# An operation is checked by running it a dozen times: few programs.
SMALL = ((5,), (2, 129), (0, 3))
# Dtypes of parameters and gradients, and whether the moments have 8 bits. Two differ in all three.
BOTH = [(torch.float32, torch.float32, False), (torch.bfloat16, torch.bfloat16, True)]
ALL = list(itertools.product(DTYPES, DTYPES, (False, True)))
VARIANTS = pytest.mark.parametrize(
    ("dtype", "gradient_dtype", "eight_bit"),
    [pytest.param(*one, marks=[] if one in BOTH else [pytest.mark.slow]) for one in ALL],
    ids=str,
)


def lists(dtype: torch.dtype, gradient_dtype: torch.dtype, eight_bit: bool, shapes: Any = SHAPES) -> list[list[Tensor]]:
    """Parameters, gradients, both moments and their scales: the first six arguments of the operation."""
    parameters, gradients = make(0, dtype, shapes), make(1, gradient_dtype, shapes)
    if eight_bit:
        states = [empty_states(w.numel(), w.device) for w in parameters]
        return [parameters, gradients, *([state[place] for state in states] for place in range(4))]
    return [
        parameters,
        gradients,
        *([torch.zeros_like(w, dtype=torch.float32) for w in parameters] for _ in range(2)),
        [],
        [],
    ]


def rest(number: int, *, stochastic: bool = True) -> tuple[Any, ...]:
    """What follows the lists: decays, scale, lr, betas, eps, update, seed, rounding."""
    return ([DECAY] * number, torch.tensor(0.5), torch.tensor(LR), *FORMULA["betas"], FORMULA["eps"], 2, 3, stochastic)


def updated(lists: list[list[Tensor]]) -> list[Tensor]:
    """Everything that an update writes."""
    return [tensor for place, tensors in enumerate(lists) if place != 1 for tensor in tensors]


@VARIANTS
def test_registration(dtype: torch.dtype, gradient_dtype: torch.dtype, eight_bit: bool) -> None:
    torch.library.opcheck(adamw_step, (*lists(dtype, gradient_dtype, eight_bit, SMALL), *rest(3)))


def test_registration_of_odd_lists() -> None:
    torch.library.opcheck(adamw_step, (*lists(DTYPES[1], DTYPES[0], False, SHAPES[2:]), *rest(1, stochastic=False)))
    torch.library.opcheck(adamw_step, ([], [], [], [], [], [], *rest(0)))
    torch.library.opcheck(adamw_step, (*lists(DTYPES[0], DTYPES[1], True, ((0,),)), *rest(1)))
    first, second = lists(DTYPES[0], DTYPES[1], True, SMALL), lists(DTYPES[1], DTYPES[0], True, SMALL)
    mixed = [one + two for one, two in zip(first, second, strict=True)]
    torch.library.opcheck(adamw_step, (*mixed, *rest(6)))
    askew = [make(place, torch.float32, ((4, 9),))[0].flatten()[3:] for place in range(4)]
    strided = make(1, torch.float32, ((33, 2),))[0][:, 1]
    torch.library.opcheck(adamw_step, ([askew[0]], [strided], [askew[1]], [askew[2].abs()], [], [], *rest(1)))


@VARIANTS
def test_the_registered_operation_has_the_bits_of_the_plain_call(
    dtype: torch.dtype, gradient_dtype: torch.dtype, eight_bit: bool
) -> None:
    one, two = (lists(dtype, gradient_dtype, eight_bit) for _ in range(2))
    adamw_step(*one, *rest(3))
    adamw(
        *two[:4], first_scales=two[4], second_scales=two[5], lr=LR, weight_decay=DECAY, update=2, seed=3,
        grad_scale=torch.tensor(0.5), **FORMULA,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(updated(one), updated(two), strict=True))
    assert not torch.equal(one[0][0], make(0, dtype)[0])


@PARAMETERS
@pytest.mark.parametrize("eight_bit", [False, True])
def test_compiles_whole_and_once(dtype: torch.dtype, eight_bit: bool) -> None:
    """The first update is compiled with its numbers; the second for numbers that change."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    results = []
    for compiled in (False, True):
        options: dict[str, Any] = {**FORMULA, "state_dtype": torch.int8 if eight_bit else torch.float32, "seed": 3}
        optimizer = AdamW(make(0, dtype, SMALL), weight_decay=[DECAY, 0.0, DECAY], **options)

        def step(gradients: list[Tensor], scale: Tensor, lr: float, update: int, to: AdamW = optimizer) -> None:
            to.step(lr, update=update, gradients=gradients, grad_scale=scale)

        call = torch.compile(step, fullgraph=True, backend=backend) if compiled else step
        for update in range(1, 4):
            call(make(update, dtype, SMALL), torch.tensor(1 / update), LR / update, update)
        moments = [*optimizer.first_moments, *optimizer.second_moments]
        results.append([*optimizer.parameters, *moments, *optimizer.first_scales, *optimizer.second_scales])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [graph.count("trine.adamw.default") for graph in graphs] == [1, 1]


def test_compiles_whole_with_gradients_of_parameters_and_with_none() -> None:
    found = []
    for compiled in (False, True):
        weights = [torch.nn.Parameter(w) for w in make(0, torch.float32, ((5,), (0, 3), (7, 3)))]
        optimizer, empty = AdamW(weights, weight_decay=DECAY, **FORMULA), AdamW([], weight_decay=DECAY, **FORMULA)
        for place, w in enumerate(weights):
            w.grad = make(place, torch.float32, (tuple(w.shape),))[0]

        def step(update: int, both: tuple[AdamW, AdamW] = (optimizer, empty)) -> None:
            for one in both:
                one.step(LR, update=update)

        (torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step)(1)
        found.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_addresses_travel_only_where_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[int] = []
    original = multi_tensor.upload

    def upload(values: Any, *rest: Any) -> Tensor:
        uploads.append(len(values))
        return original(values, *rest)

    multi_tensor._kept_upload.cache_clear()
    monkeypatch.setattr(multi_tensor, "upload", upload)
    optimizer = AdamW(make(0, torch.float32), weight_decay=DECAY, **FORMULA)
    gradients = make(1, torch.float32)
    for update, expected in ((1, [12, 3, 3]), (2, []), (3, [12]), (4, [])):
        if update == 3:
            gradients = [*gradients[:2], gradients[2].clone()]
        optimizer.step(LR, update=update, gradients=gradients)
        assert sorted(uploads, reverse=True) == expected, update
        uploads.clear()
