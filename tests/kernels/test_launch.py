"""Launches are recorded instead of run where asked; targets are what tensors say they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from trine.kernels.launch import ceil_div, launch, next_power_of_2, recording, result_dtype, rounded
from trine.kernels.samples import meta
from trine.kernels.target import COMPILED, Target, pretend, target_of, uses_triton
from trine.kernels.tuning import Config

CONFIG = Config({"BLOCK": 64}, num_warps=2, num_stages=3)


@triton.jit
def _double_kernel(x_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + places, 2 * tl.load(x_ptr + places, mask=places < size), mask=places < size)


def test_a_recorded_launch_keeps_its_arguments_and_runs_nothing() -> None:
    x = meta(100)
    with recording(COMPILED["sm_80"]) as launches:
        assert target_of(x) == COMPILED["sm_80"]
        launch(_double_kernel, (2,), CONFIG, {"x_ptr": x, "size": 100}, options={"maxnreg": 64})
        launch(_double_kernel, (0,), CONFIG, {"x_ptr": x, "size": 0})
    first, empty = launches
    assert first.kernel is _double_kernel
    assert first.grid == (2,)
    assert first.arguments == {"x_ptr": x, "size": 100, "BLOCK": 64}
    assert first.config == CONFIG
    assert first.options == {"maxnreg": 64}
    # An empty grid is compiled all the same: a rule may not be right only for what one sample needs.
    assert empty.grid == (0,)


def test_recordings_nest_and_end() -> None:
    with recording(COMPILED["sm_80"]) as outer:
        with recording(COMPILED["gfx942"]) as inner:
            launch(_double_kernel, (1,), CONFIG, {"x_ptr": meta(1), "size": 1})
            assert target_of(meta(1)).is_amd
        assert target_of(meta(1)).arch == "sm_80"
    assert [len(outer), len(inner)] == [0, 1]


def test_an_empty_grid_launches_nothing() -> None:
    # A CPU tensor has no device that Triton could launch on, so anything launched here would raise.
    launch(_double_kernel, (0, 3), CONFIG, {"x_ptr": torch.ones(1), "size": 1})


class Kernel:
    """Stands for a kernel of Triton: notes what is compiled, and what is started without asking Triton."""

    def __init__(self, *names: str, constexprs: tuple[str, ...] = ("BLOCK",)) -> None:
        self.params = [SimpleNamespace(name=name, is_constexpr=name in constexprs) for name in (*names, *constexprs)]
        self.compiled: list[dict[str, Any]] = []
        self.started: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def compile_and_start(**arguments: Any) -> Any:
            self.compiled.append(arguments)
            return Compiled(self)

        return compile_and_start


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.kernel.started.append((grid, arguments))


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)


@pytest.mark.usefixtures("no_device")
def test_options_of_a_launch_come_before_the_usual_ones() -> None:
    kernel = Kernel("x_ptr")
    for options in (None, {"maxnreg": 64}, {"enable_fp_fusion": False}):
        launch(kernel, (1,), CONFIG, {"x_ptr": torch.ones(1)}, options=options)
    assert [arguments["enable_fp_fusion"] for arguments in kernel.compiled] == [True, True, False]
    assert [arguments.get("maxnreg") for arguments in kernel.compiled] == [None, 64, None]


@pytest.mark.usefixtures("no_device")
def test_a_launch_like_an_earlier_one_is_started_with_what_was_compiled() -> None:
    kernel = Kernel("x_ptr", "size", "rate", "other")
    x = torch.ones(64)
    for size, rate in ((100, 0.5), (101, 0.25), (7, 1.0)):
        launch(kernel, (2, size), CONFIG, {"rate": rate, "size": size, "x_ptr": x, "other": None})
    assert len(kernel.compiled) == 1
    assert kernel.started == [((2, 101, 1), (x, 101, 0.25, None, 64)), ((2, 7, 1), (x, 7, 1.0, None, 64))]


@pytest.mark.usefixtures("no_device")
def test_what_triton_compiles_apart_is_kept_apart() -> None:
    kernel, x = Kernel("x_ptr", "size", "flag"), torch.ones(64)
    usual: dict[str, Any] = {"x_ptr": x, "size": 100, "flag": 2.0}
    others: list[dict[str, Any]] = [
        {"size": 1}, {"size": 160}, {"size": 2**31}, {"size": 2**63}, {"size": None}, {"size": 100.0},
        {"x_ptr": x[1:]}, {"x_ptr": x.half()}, {"x_ptr": None, "flag": x}, {"flag": True}, {"flag": None},
    ]  # fmt: skip
    for arguments in (usual, *({**usual, **other} for other in others)):
        launch(kernel, (1,), CONFIG, arguments)
    for config in (Config({"BLOCK": 32}, 2, 3), Config({"BLOCK": 64}, 4, 3), Config({"BLOCK": 64}, 2, 2)):
        launch(kernel, (1,), config, usual)
    launch(kernel, (1,), CONFIG, usual, options={"launch_pdl": True})
    assert len(kernel.compiled) == 1 + len(others) + 4
    assert not kernel.started


@pytest.mark.usefixtures("no_device")
def test_descriptors_are_alike_by_dtype_and_block_whatever_they_describe() -> None:
    kernel, x = Kernel("descriptor", "x_ptr"), torch.ones(1)

    def described(x: torch.Tensor, *block: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))

    given = [described(torch.ones(rows, 32), 8, 32) for rows in (8, 16, 3)]
    for descriptor in given:
        launch(kernel, (1,), CONFIG, {"descriptor": descriptor, "x_ptr": x})
    assert len(kernel.compiled) == 1
    assert [arguments[0] for _, arguments in kernel.started] == given[1:]
    for other in (described(torch.ones(8, 32), 16, 32), described(torch.ones(8, 32).half(), 8, 32)):
        launch(kernel, (1,), CONFIG, {"descriptor": other, "x_ptr": x})
    assert len(kernel.compiled) == 3


@pytest.mark.usefixtures("no_device")
def test_what_is_not_compared_goes_to_triton_every_time() -> None:
    kernel = Kernel("x_ptr", "descriptor")
    for _ in range(3):
        launch(kernel, (1,), CONFIG, {"x_ptr": torch.ones(1), "descriptor": object()})
    missing = Kernel("x_ptr", "has_default")
    for _ in range(3):
        launch(missing, (1,), CONFIG, {"x_ptr": torch.ones(1)})
    assert [len(kernel.compiled), len(missing.compiled)] == [3, 3]
    assert not kernel.started + missing.started


def test_a_kernel_has_no_place_on_a_cpu() -> None:
    assert not uses_triton(torch.ones(1))
    with pytest.raises(ValueError, match=r"cannot run on a tensor of cpu; move it to a GPU, or set TRITON_INTERPRET=1"):
        target_of(torch.ones(1))


def test_a_target_can_be_pretended() -> None:
    small = Target("sm_90", num_sms=4, shared_bytes=1024, gpu="NVIDIA H200")
    with pretend(small):
        assert target_of(torch.ones(1)) is small
    assert small.is_hopper
    assert not small.is_amd
    assert not small.interpreted


def test_results_are_stored_in_their_own_dtype_outside_the_interpreter() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert result_dtype(dtype) == dtype
        x = torch.ones(2, dtype=dtype)
        assert rounded(x, dtype) is x
    assert rounded(torch.ones(2), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("size", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_blocks_are_powers_of_two_that_cover(size: int, power: int) -> None:
    assert next_power_of_2(size) == power


def test_ceil_div() -> None:
    assert [ceil_div(size, 4) for size in (0, 1, 4, 5)] == [0, 1, 1, 2]
