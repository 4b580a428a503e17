"""Tests of this folder run on a CUDA device and are skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# cuBLAS reads this when it starts; without it torch refuses matrix products in its deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HERE = Path(__file__).parent
# Torch says these once in each process, where nothing is wrong: a backward whose first operation is a product, and that
# the search for waits finds most of them only. All other warnings are errors.
HARMLESS = ("Attempting to run cuBLAS, but there was no current CUDA context", "Synchronization debug mode")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder `gpu`, and skip it without a CUDA device."""
    import torch

    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            for message in HARMLESS:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}:UserWarning"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Only operations that repeat to the bit, in float32 without TF32; what was set before is put back."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_float32_matmul_precision(precision)
