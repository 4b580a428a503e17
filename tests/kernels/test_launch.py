"""Launches are recorded instead of run where asked; targets are what tensors say they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

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


def test_options_of_a_launch_come_before_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **arguments: given.append(arguments)

    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    for options in (None, {"maxnreg": 64}, {"enable_fp_fusion": False}):
        launch(Kernel(), (1,), CONFIG, {"x_ptr": torch.ones(1)}, options=options)
    assert [arguments["enable_fp_fusion"] for arguments in given] == [True, True, False]
    assert [arguments.get("maxnreg") for arguments in given] == [None, 64, None]


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
