"""The Hopper kernel of float8 products without a GPU: its schedule, barriers and numbers, from its own source."""

from __future__ import annotations

import inspect
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels import aot, verified
from trine.kernels.gluon_simulator import plain, simulate
from trine.kernels.launch import recording
from trine.kernels.quantized import hopper, hopper_check, hopper_kernel
from trine.kernels.quantized.hopper_check import FORMS, Case
from trine.kernels.quantized.scaled import launch_scaled
from trine.kernels.target import Target
from trine.kernels.tuning import Config, force

# So few multiprocessors that every program has several tiles.
SMALL = Target("sm_90", num_sms=2, shared_bytes=227 * 1024)
FLOAT8 = torch.float8_e4m3fn


def run(case: Case, seed: int = 0, given: dict[str, Any] | None = None, **how: Any) -> Tensor:
    with recording(SMALL) as launches:
        y = hopper.launch_hopper(**given or case.arguments("cpu"))
    y.fill_(float("nan"))
    assert simulate(launches[0], seed, **how).registers == (240, 24)
    assert not y.isnan().any()
    return y


def check(case: Case, seed: int = 0) -> None:
    y, exact = run(case, seed), case.exact(case.arguments("cpu"), torch.arange(case.M))
    # One rounding of the result; sums are fp32 here, of the tensor cores too.
    bound = torch.finfo(case.dtype).eps / 2 * exact.abs() + 1e-5 * exact.abs().max()
    assert bool(((y.double() - exact).abs() <= bound).all())


# --- the schedule -----------------------------------------------------------------------------------------------------

tile_place = plain(hopper_kernel.tile_place)


@pytest.mark.parametrize(("rows", "features", "group"), [(1, 1, 16), (64, 32, 16), (7, 5, 4), (33, 3, 8), (2, 9, 1)])
def test_every_tile_is_computed_once(rows: int, features: int, group: int) -> None:
    found = [tile_place(index, rows, features, group) for index in range(rows * features)]
    assert sorted(found) == [(row, feature) for row in range(rows) for feature in range(features)]


def test_tiles_that_run_at_one_time_form_a_block() -> None:
    places = [tile_place(index, 64, 32, 16) for index in range(132)]
    assert {row for row, _ in places} == set(range(16))
    assert {feature for _, feature in places} == set(range(9))


# --- the kernel's source, simulated -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_products(form: str, seed: int) -> None:
    """More pieces than stages, several tiles a program, edges in every direction."""
    check(Case(300, 520, 784, bias=seed > 0, dtype=torch.float16 if seed > 1 else torch.bfloat16, **FORMS[form]), seed)


@pytest.mark.parametrize(("M", "N", "K"), [(1, 8, 16), (64, 256, 128), (128, 128, 256), (129, 264, 144)])
@pytest.mark.parametrize("form", ["fast", "fp32", "blocks", "fp32 gated"])
def test_small_products(M: int, N: int, K: int, form: str) -> None:
    check(Case(M, N, K, **FORMS[form]))


def test_one_scale_for_all() -> None:
    for fast in (True, False):
        check(Case(70, 264, 144, scales="one", fast=fast))


@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_number_of_stages_is_free_of_deadlocks(stages: int, turns: int) -> None:
    config = Config({"STAGES": stages, "GROUP": 2, "TAKE_TURNS": turns})
    with force({hopper.HOPPER.operation: config}):
        for seed in range(4):
            for fast in (True, False):
                check(Case(400, 300 // 8 * 8, 656, fast=fast), seed)


def test_no_order_of_events_changes_a_bit() -> None:
    for form in ("fast", "blocks"):
        case = Case(200, 264, 528, **FORMS[form])
        first = run(case)
        assert all(torch.equal(run(case, seed), first) for seed in range(1, 5))


@pytest.mark.parametrize("scales", ["rows", "blocks"])
def test_pieces_are_added_in_order_and_scaled_as_by_the_twin(scales: str) -> None:
    """To the bit: sums of a piece of whole numbers are exact, so all rounding is in the additions and the scales."""
    case = Case(40, 264, 656, scales=scales, bias=True)
    given = case.arguments("cpu")
    x, w = (codes.float().round() for codes in (given["x_MK"], given["up"][0]))
    x_scales, w_scales = given["x_scales"], given["up"][1]
    given |= {"x_MK": x.to(FLOAT8), "up": (w.to(FLOAT8), w_scales)}
    sums = torch.zeros(case.M, case.N)
    for block in range(6):
        piece = slice(128 * block, 128 * block + 128)
        product = x[:, piece] @ w[:, piece].t()
        if scales == "blocks":
            product = product * (x_scales[:, block, None] * w_scales[:, block].repeat_interleave(128)[: case.N])
        sums = sums + product
    if scales == "rows":
        sums = sums * w_scales * x_scales
    assert torch.equal(run(case, given=given), (sums + given["up_bias"].float()).to(case.dtype))


@pytest.mark.parametrize(
    ("code", "serialised"),
    [
        ("QGMMA.64x128x32 R24, RZ ;\nQGMMA.64x128x32 R24, R24, gsb0 ;\n", False),
        ("QGMMA.64x128x32 R24, RZ, gsb0 ;\nQGMMA.64x128x32 R24, R24, gsb0 ;\n", True),
        ("FADD R0, R1, R2 ;\n", False),
    ],
)
def test_products_of_float8_that_wait_for_one_another_are_seen(
    code: str, serialised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "_cuobjdump", lambda *_: code)
    assert aot._serialised(b"") is serialised


# --- mistakes that the simulation is for ------------------------------------------------------------------------------


def test_a_wrong_count_of_arrivals_is_noticed() -> None:
    case = Case(300, 300 // 8 * 8, 784)
    with pytest.raises(AssertionError, match="deadlock"):
        run(case, arrivals=lambda count: 3 if count == 2 else count)
    with pytest.raises(AssertionError, match=r"shared memory changed|deadlock|more arrivals"):
        run(case, arrivals=lambda count: 1)


# What is wrong: the function, what is replaced in its source, by what, and the forms in which it shows.
MISTAKES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "no wait for a piece": (
        "_sum_in_tensor_cores", r"mbarrier\.wait\(full.*", "pass", ("fast",)),
    "no wait for a piece, fp32": (
        "_sum_in_fp32", r"mbarrier\.wait\(loaded.*", "pass", ("fp32", "blocks")),
    "wrong parity of a piece": (
        "_sum_in_fp32", r"\(count // STAGES\) & 1", "((count // STAGES) & 1) ^ 1", ("fp32",)),
    "no wait for an empty slot": (
        "_load_role", r"mbarrier\.wait\(empty.*", "pass", ("fast", "fp32")),
    "wrong parity of an empty slot": (
        "_load_role", r"& 1\) \^ 1", "& 1)", ("fast", "fp32")),
    "a ring that forgets a stage": (
        "_load_role", r"\(\(count // STAGES\) & 1\) \^ 1", "(((count + 1) // STAGES) & 1) ^ 1", ("fast", "fp32")),
    "too few bytes": (
        "_load_role", r"2 \* x_desc\.block_type\.nbytes", "x_desc.block_type.nbytes", ("fast", "fp32")),
    "a slot given back too early": (
        "_sum_in_tensor_cores", r"\(count \+ STAGES - 1\) % STAGES", "count % STAGES", ("fast",)),
    "a slot never given back": (
        "_sum_in_tensor_cores", r"mbarrier\.arrive\(empty\.index\(\(count - 1\).*", "pass", ("fast",)),
    "a slot given back before its last product": (
        "_sum_in_fp32", r"product, turn = _product\(x, w_smem\.index\(2 \* slot\)",
        "mbarrier.arrive(empty.index(slot), count=1); product, turn = _product(x, w_smem.index(2 * slot)", ("fp32",)),
    "no wait for a product": (
        "_product", r"return warpgroup_mma_wait\(0, deps=\(product,\)\), turn \+ 1", "return product, turn + 1",
        ("fp32", "blocks")),
    "no wait for the last product": (
        "_sum_in_tensor_cores", r"sums_0, sums_1 = warpgroup_mma_wait\(0.*", "pass", ("fast", "fast gated")),
    "a turn never passed on": (
        "_product", r"mbarrier\.arrive\(turns.*", "pass", ("fp32",)),
    "both begin": (
        "_product", r"\(turn & 1\) \^ \(1 - HALF\)", "turn & 1", ("fp32",)),
    "no wait for a copy to memory": (
        "_store", r"tma_store_wait\(0\)", "pass", ("fast", "fp32")),
    "no fence before a copy to memory": (
        "_store", r"fence_async_shared\(\)", "pass", ("fast", "fp32")),
    "a role ends before its copies": (
        "_compute_role", r"\n    tma_store_wait\(0\)", "\n    pass", ("fast",)),
}  # fmt: skip


def mistaken(function: Any, pattern: str, replacement: str) -> Any:
    """A jitted function whose source is changed: what `plain` needs of it."""
    source = inspect.getsource(function.fn)
    source = source[source.index("def ") :]
    changed, count = re.subn(pattern, replacement, source)
    assert count, f"{pattern} is not in {function.fn.__name__}"
    scope: dict[str, Any] = {}
    exec(compile("from __future__ import annotations\n" + changed, "mistaken", "exec"), scope)
    made: FunctionType = scope[function.fn.__name__]
    return FunctionType(made.__code__, function.fn.__globals__, made.__name__, made.__defaults__)


def test_a_change_that_changes_nothing_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {name for name, *_ in MISTAKES.values()}:
        function: Any = getattr(hopper_kernel, name)
        monkeypatch.setattr(function, "fn", mistaken(function, "def ", "def  "))
    for form in FORMS.values():
        check(Case(300, 520, 784, **form))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_protocol_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, pattern, replacement, forms = MISTAKES[mistake]
    function: Any = getattr(hopper_kernel, name)
    monkeypatch.setattr(function, "fn", mistaken(function, pattern, replacement))
    for form in forms:
        assert noticed(Case(300, 520, 784, **FORMS[form])), form


def noticed(case: Case) -> bool:
    """Whether one of some orders of events ends in an assertion."""
    for seed in range(8):
        try:
            run(case, seed)
        except AssertionError:
            return True
    return False


# --- the choice -------------------------------------------------------------------------------------------------------


def chosen(case: Case, target: Target, use: bool | None = None, **changed: Any) -> str:
    """The kernel that a product launches."""
    given = {**case.arguments("cpu"), "activation": case.activation, "limit": None, **changed}
    with recording(target) as launches, nullcontext() if use is None else hopper.EXPERIMENTAL.force(use):
        launch_scaled(**given)
    name: str = launches[0].kernel.__name__
    return name


def test_kernel_is_chosen_where_it_is_verified_and_large_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large, h200 = Case(256, 256, 128), replace(SMALL, gpu="NVIDIA H200")
    monkeypatch.setattr(verified, "VERIFIED", tmp_path / "verified.json")
    verified._entries.cache_clear()
    twin, kernel = "scaled_matmul_kernel", "scaled_hopper_kernel"
    assert chosen(large, h200) == chosen(large, h200, False) == twin
    assert chosen(large, h200, True) == kernel
    verified.mark_verified(hopper.OPERATION, h200.gpu)
    for form in FORMS.values():
        assert chosen(Case(256, 256, 128, **form), h200) == kernel
    assert chosen(large, h200, False) == twin
    assert chosen(large, replace(h200, gpu="NVIDIA H100 80GB HBM3")) == twin
    # One tile for two multiprocessors; but two of a gate.
    assert chosen(Case(128, 256, 128), h200) == twin
    assert chosen(Case(128, 256, 128, gated=True), h200) == kernel
    assert chosen(Case(256, 256, 120), h200) == twin
    assert chosen(large, h200, dtype=torch.float32) == twin
    verified._entries.cache_clear()


@pytest.mark.parametrize(
    ("case", "changed", "reason"),
    [
        (Case(8, 8, 16), {"activation": "relu"}, "activation relu"),
        (Case(8, 8, 16, gated=True), {"activation": "gelu"}, "activation gelu of a gate"),
        (Case(8, 8, 16, dtype=torch.float32), {}, "results in torch.float32"),
        (Case(8, 8, 24), {}, "K = 24 is no multiple of 16"),
        (Case(8, 12, 16), {}, "N = 12 is no multiple of 8"),
        (Case(0, 8, 16), {}, "x is empty"),
    ],
    ids=str,
)
def test_calls_for_the_twin(case: Case, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        chosen(case, SMALL, True, **changed)
    assert chosen(case, SMALL, False, **changed) == "scaled_matmul_kernel"


def test_tensors_for_the_twin() -> None:
    given = Case(8, 8, 16).arguments("cpu")
    x, up = given["x_MK"], given["up"]

    def obstacle(x: Tensor, up: hopper.Scaled, target: Target = SMALL) -> str | None:
        return hopper.obstacle(x, None, up, "none", torch.bfloat16, target)

    assert obstacle(x, up) is None
    assert "sm_80" in (obstacle(x, up, replace(SMALL, arch="sm_80")) or "")
    assert "int8" in (obstacle(x, (up[0].view(torch.int8), up[1])) or "")
    shifted = torch.zeros(8 * 16 + 8, dtype=FLOAT8)[8:].view(8, 16)
    assert "x is not contiguous from a multiple" in (obstacle(shifted, up) or "")
    assert "the weight is not contiguous" in (obstacle(x, (torch.zeros(16, 8, dtype=FLOAT8).t(), up[1])) or "")


# --- the check on a GPU -----------------------------------------------------------------------------------------------


def small(case: Case) -> Case:
    return replace(case, M=min(case.M, 70), N=min(case.N, 136), K=min(case.K, 272))


@pytest.mark.parametrize("name", hopper_check.GROUPS)
def test_the_check_passes_right_results_and_no_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, at small sizes, with results in place of the kernel's and the twin's."""
    for case in map(small, hopper_check.GROUPS[name]):
        right = case.exact(case.arguments("cpu"), torch.arange(case.M)).to(case.dtype)
        wrong, lost = right.clone(), right.clone()
        wrong[64, 130] += 0.25 * right.abs().max()
        lost[69, 135] = float("nan")
        monkeypatch.setattr(hopper_check, "launch_scaled", lambda right=right, **_: right.clone())
        problems, noticed = hopper_check.check(case, "cpu")
        assert problems == []
        assert ("100.0000 %" in noticed) == case.twin
        for bad, found in ((wrong, "error"), (lost, "not written")):
            monkeypatch.setattr(hopper_check, "launch_scaled", lambda bad=bad, **_: bad.clone())
            assert found in "; ".join(hopper_check.check(case, "cpu")[0])
        results = iter((right, wrong, right))
        monkeypatch.setattr(hopper_check, "launch_scaled", lambda results=results, **_: next(results).clone())
        assert "two runs differ" in hopper_check.check(case, "cpu")[0]
