"""Tests of this folder run on a CUDA device and are skipped where there is none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest

# cuBLAS reads this when it starts; without it torch refuses matrix products in its deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
LARGE = ("past_2_to_the_31", "mixtral", "gpt_oss", "goal_shape")
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
            # What torch 2.11 says of itself when it is imported to compile.
            item.add_marker(pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"))
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


@pytest.fixture(autouse=True)
def one_large_test_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests with tensors of many GiB wait for each other, where several processes share the GPU; none keeps much."""
    import torch

    if not any(name in request.node.name for name in LARGE):
        yield
    else:
        with open(Path(tempfile.gettempdir()) / f"trine-large-{os.getuid()}.lock", "w", encoding="utf-8") as file:
            flock(file, LOCK_EX)
            yield
            torch.cuda.empty_cache()
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End a test process whose device is broken: every test after would fail with it. pytest-xdist starts another."""
    import torch

    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{item.nodeid}: the device is broken for this process: {error}", flush=True)
        os._exit(1)
