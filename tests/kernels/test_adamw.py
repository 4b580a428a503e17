"""AdamW on the CPU: random bits, 8-bit states, stochastic rounding, and the launch configurations of its kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.adamw import plain
from trine.kernels.adamw.checks import STATE_DTYPES
from trine.kernels.adamw.formula import adamw_reference
from trine.kernels.adamw.kernel import ADAMW
from trine.kernels.adamw.op import adamw, adamw_step
from trine.kernels.adamw.optimizer import AdamW
from trine.kernels.adamw.rounding import GROUP, draws, philox, round_stochastically
from trine.kernels.adamw.states import BLOCK, RATIO, decode, empty_states, encode_first, encode_second
from trine.kernels.target import COMPILED, INTERPRETER

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [
        (0, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_words(word: int, key: tuple[int, int], expected: tuple[int, ...]) -> None:
    counter = torch.tensor([word])
    assert tuple(int(x) for x in philox((counter, counter, counter, counter), key)) == expected


def test_draws_are_uniform_and_depend_on_everything() -> None:
    options = {"seed": 3, "tensor": 1, "update": 7, "purpose": 0}
    found = draws(100_000, CPU, **options)
    assert int(found.min()) >= 0
    assert int(found.max()) < 65536
    # Mean of 100,000 uniform numbers: three standard deviations.
    assert abs(float(found.double().mean()) - 32767.5) < 3 * 65536 / 12**0.5 / 100_000**0.5
    assert len(found.unique()) > 50_000
    for name in options:
        other = draws(100_000, CPU, **{**options, name: options[name] + 1})
        assert float((other == found).double().mean()) < 1e-3, name
    assert torch.equal(draws(100_000 - 2 * GROUP, CPU, start=2 * GROUP, **options), found[2 * GROUP :])
    assert torch.equal(draws(5, CPU, **options), found[:5])


def test_stochastic_rounding_is_right_on_average() -> None:
    x = make(64).repeat(4096)
    draw = draws(len(x), CPU, seed=0, tensor=0, update=1, purpose=0)
    rounded = round_stochastically(x, draw).double().view(4096, 64)
    bits = x[:64].view(torch.int32)
    below = (bits & ~0xFFFF).view(torch.float32).double()
    above = ((bits & ~0xFFFF) + 0x10000).view(torch.float32).double()
    assert ((rounded == below) | (rounded == above)).all()
    share = (bits & 0xFFFF).double() / 65536
    sigma = (above - below).abs() * (share * (1 - share)).sqrt() / 64
    # Of 64 means about one in 370 is beyond three sigma; the mean of all must not be.
    off = (rounded.mean(dim=0) - x[:64].double()) / sigma
    assert float(off.abs().max()) < 4
    assert abs(float(off.mean())) < 3 / 8


def test_stochastic_rounding_keeps_what_bf16_can_hold() -> None:
    x = make(1000, dtype=torch.bfloat16)
    x[:4] = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    most = torch.full((1000,), 65535, dtype=torch.int32)
    assert torch.equal(round_stochastically(x.float(), most).view(torch.int16), x.view(torch.int16))
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nan, most[:2]).isnan().all()


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_states_stay_within_a_level_and_are_right_on_average(second: bool) -> None:
    size = 3 * BLOCK + 17
    x = make(size) * torch.exp2(-12 * torch.rand(size, generator=torch.Generator().manual_seed(1)))
    x = x.square() if second else x
    encode = encode_second if second else encode_first
    total = torch.zeros(size, dtype=torch.float64)
    for update in range(400):
        codes, scales = encode(x, draws(size, CPU, seed=1, tensor=0, update=update, purpose=1))
        found = decode(codes, scales).double()
        smallest = scales.double().repeat_interleave(BLOCK)[:size] * 2 ** (-31.75 if second else -15.75)
        assert ((found - x).abs() <= torch.maximum((RATIO - 1) * 1.0001 * x.abs().double(), smallest)).all()
        assert (found.sign() * x.sign() >= 0).all()
        total += found
    usable = x.abs() > smallest
    assert usable.double().mean() > 0.95
    off = ((total / 400 - x) / x.abs())[usable]
    # One rounding errs by at most half a gap in the root of the mean square.
    assert float(off.abs().max()) < 4.5 * (RATIO - 1) / 2 / 20
    assert abs(float(off.mean())) < 3 * (RATIO - 1) / 2 / 20 / size**0.5
    assert codes.dtype == (torch.uint8 if second else torch.int8)
    assert len(scales) == 4


def test_states_at_their_limits() -> None:
    drawn = torch.full((BLOCK,), 65535, dtype=torch.int32)
    x = torch.zeros(BLOCK)
    for encode in (encode_first, encode_second):
        codes, scales = encode(x, drawn)
        assert not decode(codes, scales).any()
    x[0], x[1] = 1.0, 1e-30
    codes, scales = encode_second(x, drawn)
    assert codes[:3].tolist() == [255, 1, 0]  # never rounded down to zero
    codes, scales = encode_first(x, drawn)
    assert codes[:3].tolist() == [127, 0, 0]
    codes, scales = encode_first(-x * 1e-38, torch.zeros_like(drawn))
    assert codes[:3].tolist() == [-127, 0, 0]
    assert torch.isfinite(decode(codes, scales)).all()


def run(parameters: list[Tensor], steps: int, *, lr: float = 1e-2, seed: int = 9, **options: Any) -> AdamW:
    optimizer = AdamW(parameters, **{**OPTIONS, **options})
    for update in range(1, steps + 1):
        gradients = [make(*p.shape, seed=seed * 1000 + update, dtype=p.dtype) for p in parameters]
        optimizer.step(lr, update=update, gradients=gradients)
    return optimizer


def test_fp32_is_the_formula_and_has_the_bits_of_torchs_kernel() -> None:
    start = [make(33, 5), make(7, seed=1), make(0, 4)]
    ours, theirs = ([p.clone() for p in start] for _ in range(2))
    exact = [(p.double(), p.double() * 0, p.double() * 0) for p in start]
    optimizer = AdamW(ours, betas=(0.9, 0.95), eps=1e-8, weight_decay=[0.1, 0.0, 0.1])
    first, second = ([torch.zeros_like(p) for p in start] for _ in range(2))
    for update in range(1, 6):
        for place, parameter in enumerate(ours):
            parameter.grad = make(*parameter.shape, seed=update)
            decay = 0.0 if place == 1 else 0.1
            torch._fused_adamw_(
                [theirs[place]], [parameter.grad], [first[place]], [second[place]], [],
                [torch.tensor(float(update))], lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=decay, eps=1e-8,
                amsgrad=False, maximize=False,
            )  # fmt: skip
            w, m, v = exact[place]
            exact[place] = adamw_reference(
                w, parameter.grad.double(), m, v, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay,
                update=update,
            )  # fmt: skip
        optimizer.step(1e-2, update=update)
    for mine, other, (w, _, _) in zip(ours, theirs, exact, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine.double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_a_gradient_scale_is_that_of_the_gradients(state: torch.dtype, dtype: torch.dtype) -> None:
    one, two = (AdamW([make(40, dtype=dtype)], **OPTIONS, state_dtype=state) for _ in range(2))
    gradient = make(40, seed=1, dtype=dtype)
    one.step(1e-2, update=1, gradients=[gradient], grad_scale=torch.tensor(0.25))
    two.step(1e-2, update=1, gradients=[gradient * 0.25])
    assert torch.equal(one.parameters[0], two.parameters[0])
    assert torch.equal(one.first_moments[0], two.first_moments[0])
    assert torch.equal(gradient, make(40, seed=1, dtype=dtype))


@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_bits_repeat_and_depend_on_the_seed(state: torch.dtype) -> None:
    found = []
    for seed in (5, 5, 6):
        parameters = [make(3 * GROUP + 5, dtype=torch.bfloat16)]
        optimizer = AdamW(parameters, **OPTIONS, state_dtype=state, seed=seed)
        optimizer.step(1e-3, update=1, gradients=[make(3 * GROUP + 5, seed=2, dtype=torch.bfloat16)])
        found.append(parameters[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for piece in (GROUP, 2**18):
        monkeypatch.setattr(plain, "PIECE", piece)
        parameters = [make(2 * GROUP + 300, dtype=torch.bfloat16)]
        optimizer = run(parameters, 2, state_dtype=torch.int8)
        results.append([*parameters, *optimizer.first_moments, *optimizer.second_scales])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_stochastic_rounding_keeps_small_updates_that_rounding_to_nearest_loses() -> None:
    """Every update is 2^-12 of a weight of 1, an eighth of a rounding error."""
    means = {}
    for stochastic in (True, False):
        weights = torch.ones(4096, dtype=torch.bfloat16)
        optimizer = AdamW([weights], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, stochastic_rounding=stochastic)
        for update in range(1, 65):
            optimizer.step(2.0**-12, update=update, gradients=[torch.ones_like(weights)])
        means[stochastic] = float(weights.double().mean())
    assert means[False] == 1.0
    # Each step's error is at most 2^-8 with probability under 1/16, so its deviation under 2^-10.
    assert abs(means[True] - (1 - 64 * 2.0**-12)) < 3 * 2.0**-10 * 8 / 64


def test_8_bit_states_train_as_well_as_fp32() -> None:
    """Least squares with noisy gradients: the end is as near the optimum."""
    losses = {}
    target, curvature = make(2000, seed=3), torch.exp2(torch.linspace(-6, 0, 2000))
    for state in STATE_DTYPES:
        weights = torch.zeros(2000)
        optimizer = AdamW([weights], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, state_dtype=state)
        for update in range(1, 301):
            noise = make(2000, seed=update) * 0.1
            optimizer.step(0.03 * (1 - update / 301), update=update, gradients=[curvature * (weights - target + noise)])
        losses[state] = float((curvature * (weights - target).square()).sum())
    assert losses[torch.int8] < 1.1 * losses[torch.float32] + 0.1
    assert losses[torch.float32] < 5


def test_moving_averages_do_not_stand_still() -> None:
    """Without gradient beside one large number, moments fade as they should: rounding to nearest would stop them."""
    weights = torch.zeros(256)
    optimizer = AdamW([weights], betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, state_dtype=torch.int8)
    gradient = torch.full((256,), 0.01)
    gradient[0] = 1.0
    for update in range(1, 31):
        optimizer.step(0.0, update=update, gradients=[gradient])
        gradient[1:] = 0.0
    second = decode(optimizer.second_moments[0], optimizer.second_scales[0])[1:].mean()
    assert float(second) == pytest.approx(0.01 * 0.01**2 * 0.99**29, rel=0.03)


def test_8_bit_states_take_a_quarter_of_the_memory() -> None:
    states = empty_states(2**16, CPU)
    assert sum(t.nbytes for t in states) == 2 * (2**16 + 4 * 2**16 // BLOCK)
    assert AdamW([], **OPTIONS).step(1e-3, update=1) is None


@pytest.mark.parametrize(
    ("parameters", "options", "message"),
    [
        ([torch.zeros(2, dtype=torch.float16)], {}, "parameter 0 is torch.float16"),
        ([torch.zeros(2, 3).t()], {}, r"parameter 0 has strides \(1, 3\)"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], {}, "2 devices"),
        ([torch.zeros(2)], {"state_dtype": torch.float16}, "state_dtype is torch.float16"),
        ([torch.zeros(2)], {"seed": -1}, "seed is -1"),
        ([torch.zeros(2)], {"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ([torch.zeros(2)], {"weight_decay": [0.1, 0.2]}, "2 weight decays for 1 parameters"),
    ],
    ids=["dtype", "strides", "devices", "states", "seed", "betas", "decays"],
)
def test_bad_parameters_are_refused(parameters: list[Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"parameter 0, of shape \(2,\), has no gradient"),
        ({"update": 0}, "updates are counted from 1"),
        ({"gradients": []}, "0 gradients for 1 parameters"),
        ({"gradients": [torch.zeros(2, 1)]}, r"float32 \(2, 1\); expected float32 or bfloat16 \(2,\)"),
        ({"gradients": [torch.zeros(2).double()]}, "is torch.float64"),
        ({"gradients": [torch.zeros(2, device="meta")]}, "on cpu, its gradient on meta"),
        ({"gradients": [torch.zeros(2)], "grad_scale": torch.zeros(2)}, r"grad_scale is torch.float32 \(2,\)"),
    ],
    ids=["none", "update", "number", "shape", "dtype", "device", "scale"],
)
def test_bad_steps_are_refused_and_change_nothing(options: dict[str, Any], message: str) -> None:
    parameter = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        AdamW([parameter], **OPTIONS).step(1e-3, **{"update": 1, **options})
    assert torch.equal(parameter, torch.ones(2))


@pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
def test_configurations(target: Any) -> None:
    for states in (1, 4):
        for dtype in (torch.float32, torch.bfloat16):
            config = ADAMW.pick(dtype, target, N=10**9, exact_states=states)
            assert config.blocks["ROWS"] in (1, 2)
            candidates = ADAMW.candidates({"N": 10**9, "exact_states": states}, dtype, target)
            assert len(candidates) > 5
            assert all(c.blocks["ROWS"] & (c.blocks["ROWS"] - 1) == 0 for c in candidates)


def arguments(dtype: torch.dtype, *, eight_bit: bool = False) -> dict[str, Any]:
    """An update of three tensors, one of them empty, by name."""
    parameters = [make(*shape, seed=place, dtype=dtype) for place, shape in enumerate(((3, 5), (GROUP + 7,), (0, 2)))]
    lists = {"first_moments": [torch.zeros(w.shape) for w in parameters]}
    lists["second_moments"] = [m.clone() for m in lists["first_moments"]]
    if eight_bit:
        states = [empty_states(w.numel(), CPU) for w in parameters]
        names = ("first_moments", "second_moments", "first_scales", "second_scales")
        lists = {name: [state[place] for state in states] for place, name in enumerate(names)}
    gradients = [make(*w.shape, seed=9 + place, dtype=dtype) for place, w in enumerate(parameters)]
    return {"parameters": parameters, "gradients": gradients, **lists, "lr": 1e-2, "update": 3, "seed": 5, **OPTIONS}


def registered(named: dict[str, Any], lr: Tensor | None = None) -> tuple[Any, ...]:
    """The same as arguments of the registered operation."""
    lists = [named.get(name, []) for name in ("parameters", "gradients", "first_moments", "second_moments")]
    lists += [named.get(name, []) for name in ("first_scales", "second_scales")]
    lr = torch.tensor(named["lr"], dtype=torch.float64) if lr is None else lr
    decays = [named["weight_decay"]] * len(lists[0])
    return *lists, decays, None, lr, *named["betas"], named["eps"], named["update"], named["seed"], True


VARIANTS = pytest.mark.parametrize(
    ("dtype", "eight_bit"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=str,
)


@VARIANTS
def test_the_registered_operation_compiles_whole_with_the_bits_of_the_plain_call(
    dtype: torch.dtype, eight_bit: bool
) -> None:
    torch._dynamo.reset()
    torch.library.opcheck(adamw_step, registered(arguments(dtype, eight_bit=eight_bit)))

    def function(named: dict[str, Any]) -> None:
        adamw(**named)

    plain, direct, whole = (arguments(dtype, eight_bit=eight_bit) for _ in range(3))
    function(plain)
    adamw_step(*registered(direct))
    torch.compile(function, fullgraph=True, backend="aot_eager")(whole)
    for name in ("parameters", "first_moments", "second_moments", *(("first_scales", "second_scales") * eight_bit)):
        for one, two, three in zip(plain[name], direct[name], whole[name], strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, three)
    assert not torch.equal(plain["parameters"][0], arguments(dtype)["parameters"][0])


def test_the_function_does_what_the_optimizer_does() -> None:
    named = arguments(torch.bfloat16, eight_bit=True) | {"update": 1}
    optimizer = AdamW([w.clone() for w in named["parameters"]], **OPTIONS, seed=5, state_dtype=torch.int8)
    optimizer.step(1e-2, update=1, gradients=named["gradients"])
    adamw(**named)
    for ours, theirs in (("parameters", optimizer.parameters), ("second_scales", optimizer.second_scales)):
        assert all(torch.equal(a, b) for a, b in zip(named[ours], theirs, strict=True))


@pytest.mark.parametrize(
    ("eight_bit", "changes", "message"),
    [
        (False, {"first_moments": []}, "the first moment is given 0 times for 3 parameters"),
        (True, {"second_scales": []}, "the scale of the second moment is given 0 times for 3 parameters"),
        (True, {"first_scales": [], "second_scales": []}, r"moment of parameter 0 is torch.int8 .* \(without scales; "),
        (
            False,
            {"first_scales": [torch.zeros(1)] * 3},
            r"is torch.float32 \(3, 5\) on cpu; expected torch.int8 \(15,\)",
        ),
        (False, {"second_moments": [torch.zeros(5, 3).t()] * 3}, r"parameter 0 has strides \(1, 3\); make it contig"),
        (False, {"update": 0}, "update is 0; updates are counted from 1"),
        (False, {"seed": 2**63}, "seed is 9223372036854775808"),
        (False, {"weight_decay": [0.1]}, "1 weight decays for 3 parameters"),
        (False, {"gradients": [torch.zeros(3, 5)]}, "1 gradients for 3 parameters"),
        (False, {"grad_scale": torch.zeros(1, device="meta")}, "grad_scale is on meta, the parameters on cpu"),
    ],
    ids=["moments", "scales", "codes", "fp32", "strides", "update", "seed", "decays", "gradients", "scale"],
)
def test_lists_that_do_not_fit_are_refused_and_not_changed(
    eight_bit: bool, changes: dict[str, Any], message: str
) -> None:
    named = arguments(torch.float32, eight_bit=eight_bit)
    with pytest.raises(ValueError, match=message):
        adamw(**{**named, **changes})
    for w, start in zip(named["parameters"], arguments(torch.float32)["parameters"], strict=True):
        assert torch.equal(w, start)


def test_a_learning_rate_that_the_host_would_wait_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr is \(\) on meta; expected one number on the CPU"):
        adamw_step(*registered(arguments(torch.float32), torch.zeros((), device="meta")))
