"""Every kernel that has a choice of configurations is in a case of `trine bench kernels`, so that --tune reaches it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch

from trine.benchmarks.kernel_check import as_tuple
from trine.benchmarks.kernel_problem import Case, all_cases
from trine.kernels.launch import recording
from trine.kernels.samples import OPERATIONS
from trine.kernels.target import COMPILED
from trine.kernels.tuning import Tunable, observing

# What only larger cases than those of a CPU launch: many rows of packed weights, few rows that are split.
LARGE = {"dequantize", "quantized_combine"}
# Kernels that are chosen where they have been verified; and those of features that no case has.
ELSEWHERE = {"attention_hopper", "scaled_hopper", "attention_backward_bias", "norm_backward_means"}


def asked_by(case: Case) -> set[str]:
    """The kernels that a case asks a configuration for, in its forward and backward, as on Hopper; none runs."""
    problem = case.problem(torch.device("cpu"), torch.bfloat16)
    with recording(COMPILED["sm_90"]), observing() as asked:
        results = as_tuple(problem.ours())
        if problem.leaves:
            torch.autograd.grad(results, problem.leaves, [torch.zeros_like(y) for y in results])
    return {question.tunable.operation for question in asked}


def tunables() -> set[str]:
    """Those of every module of operations, and of what it imports."""
    for name in OPERATIONS:
        importlib.import_module(f"trine.kernels.{name}")
    found: set[str] = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("trine.kernels."):
            values = list(vars(module).values())
            values += [value for table in values if isinstance(table, dict) for value in table.values()]
            found |= {value.operation for value in values if isinstance(value, Tunable)}
    return found


def test_tuning_reaches_every_kernel_with_a_choice() -> None:
    asked = set().union(*(asked_by(case) for case in all_cases() if not case.on_gpu))
    assert asked == tunables() - LARGE - ELSEWHERE


@pytest.mark.parametrize(("rows", "expected"), [(16, "quantized_combine"), (4096, "dequantize")])
def test_tuning_reaches_what_large_cases_launch(rows: int, expected: str) -> None:
    """At less width than the cases of these rows have."""
    case = next(
        c
        for c in all_cases()
        if c.on_gpu and c.operation == "quantized_linear" and (c.sizes["M"], c.sizes["kind"]) == (rows, "w4")
    )
    assert expected in asked_by(replace(case, sizes={**case.sizes, "N": 1024, "K": 1024}))
