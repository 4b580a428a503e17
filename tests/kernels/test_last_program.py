"""Merging by the last program, without a GPU: where it is chosen, whose counters it takes, what machine code orders.

What it computes, in any order of programs, is tested in the interpreter.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from trine.kernels import aot, last_program, verified
from trine.kernels.last_program import LAST_PROGRAM, counters, graph_counters, selected
from trine.kernels.launch import recording
from trine.kernels.paged_attention.launcher import programs_per_sm
from trine.kernels.samples import all_samples
from trine.kernels.target import COMPILED, Target, pretend
from trine.kernels.tuning import Config

OPERATIONS = ("quantized.registered", "paged_attention.launcher")
H200 = Target("sm_90", num_sms=132, shared_bytes=2**17, gpu="NVIDIA H200")


def compiled(operation: str, name: str) -> Any:
    """The machine code of a sample's first kernel for sm_90."""
    job = next(job for job in aot.jobs(aot.Selection((operation,), name, ("sm_90",))) if "kernel 0" in job.key)
    config = job.launch.config
    return triton.compile(
        ASTSource(job.launch.kernel, *aot.specialised(job.launch)),
        target=aot._GPU_TARGETS["sm_90"],
        options={"num_warps": config.num_warps, "num_stages": config.num_stages, **job.launch.options},
    )


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("quantized.registered", "weight_only w4 g128 1x8192x8192 in one launch"),
        ("paged_attention.launcher", "decode 1 x 64k in one launch"),
    ],
)
def test_parts_are_stored_before_the_count_and_read_after_it(operation: str, name: str) -> None:
    """All threads: store, barrier; one: add, with fences on both sides; all: barrier, loads past the first cache."""
    asm = compiled(operation, name).asm
    assert "ld.global.nc" not in asm["ptx"]
    (add,) = re.findall(r"atom\.global\.\S+", asm["ptx"])
    assert add == "atom.global.gpu.acq_rel.add.u32"
    before, after = asm["ptx"].split(add)
    assert re.search(r"bar\.sync\s+0;(?!.*st\.global)", before[before.rindex("st.global") :], re.DOTALL)
    first_read = re.search(r"ld\.global\S*", after)
    assert first_read is not None
    assert first_read[0].startswith("ld.global.cg")
    assert "bar.sync" in after[: first_read.start()]
    # As ptxas has it: what comes before is visible to the whole GPU, and no line that was cached before is read.
    sass = aot._cuobjdump(asm["cubin"], "--dump-sass")
    order = re.findall(r"MEMBAR\.ALL\.GPU|ATOMG\S+|CCTL\.IVALL|BAR\.SYNC|LDG\S*STRONG\.GPU|STG\S*", sass)
    place = next(place for place, word in enumerate(order) if word.startswith("ATOMG"))
    stores = [at for at, word in enumerate(order[:place]) if word.startswith("STG")]
    assert "BAR.SYNC" in order[stores[-1] : place]
    assert [order[place - 1], *order[place + 1 : place + 3]] == ["MEMBAR.ALL.GPU", "CCTL.IVALL", "BAR.SYNC"]
    assert all(at > place for at, word in enumerate(order) if word.startswith("LDG"))


def test_a_barrier_of_amd_gpus_waits_for_no_store() -> None:
    """Why they launch twice: of the stores of other waves nothing is known when the count is published."""
    with pytest.raises(ValueError, match="forced but cannot be used: gfx942 is an AMD GPU"), LAST_PROGRAM.force(True):
        selected(COMPILED["gfx942"])
    assert not selected(COMPILED["gfx942"])


def test_it_is_chosen_where_it_is_verified_or_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verified, "VERIFIED", tmp_path / "verified.json")
    verified._entries.cache_clear()
    assert not selected(H200)
    verified.mark_verified(LAST_PROGRAM.operation, H200.gpu)
    assert selected(H200)
    with LAST_PROGRAM.force(False):
        assert not selected(H200)
    verified._entries.cache_clear()


def test_checks_that_end_at_once_lose_no_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verified, "VERIFIED", tmp_path / "verified.json")
    verified._entries.cache_clear()
    verified.mark_verified("one", "GPU")
    assert verified.is_verified("one", "GPU")
    # Another process adds an entry after this one has read the file.
    other = {"triton": triton.__version__, "gpu": "GPU"}
    verified.VERIFIED.write_text(json.dumps({"one": [other], "other": [other]}), encoding="utf-8")
    verified.mark_verified("two", "GPU")
    assert [verified.is_verified(name, "GPU") for name in ("one", "other", "two")] == [True] * 3
    verified._entries.cache_clear()


def test_nothing_is_verified_before_it_ran() -> None:
    """The check on a GPU adds entries; whoever adds one by hand should have to change this test."""
    entries = json.loads(Path(verified.VERIFIED).read_text(encoding="utf-8"))
    assert LAST_PROGRAM.operation not in entries


def test_a_launch_less_is_made_for_every_split_product_and_attention() -> None:
    """And nothing starts early where nothing waits for it."""
    names = [sample.name for sample in all_samples(OPERATIONS) if sample.name.endswith(" in one launch")]
    assert len(names) > 8
    for sample in all_samples(OPERATIONS):
        if f"{sample.name} in one launch" not in names:
            continue
        with recording(COMPILED["sm_90"]) as two:
            sample.call()
        with recording(COMPILED["sm_90"]) as one, LAST_PROGRAM.force(True):
            sample.call()
        assert len(one) == len(two) - 1
        assert not any(launch.arguments.get("EARLY") for launch in one)
        assert [launch.arguments.get("EARLY") for launch in two] == [True, True]


class Device:
    """A CUDA device that is not there: streams are numbers, and counters lie in memory of the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, zeros = 1, False, torch.zeros
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=self.stream))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(last_program, "_of_stream", {})

        def on_cpu(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
            assert not self.capturing, "a fill of memory would be part of the graph"
            return zeros(*size, dtype=dtype)

        monkeypatch.setattr(torch, "zeros", on_cpu)

    def counters(self, number: int, where: str = "cuda:0") -> Tensor | None:
        like: Any = SimpleNamespace(is_cuda=True, device=torch.device(where))
        with pretend(H200), LAST_PROGRAM.force(True):
            return counters(like, number)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_every_stream_of_every_device_has_counters_of_its_own(device: Device) -> None:
    first = device.counters(8)
    assert first is not None
    assert first.dtype == torch.int32
    assert not first.any()
    assert device.counters(100) is first
    other_device = device.counters(8, "cuda:1")
    device.stream = 2
    other_stream = device.counters(8)
    found = [first, other_device, other_stream]
    assert len({id(x) for x in found}) == 3
    more = device.counters(100_000)
    assert more is not None
    assert len(more) == 100_000
    assert device.counters(8) is more


def test_a_graph_has_counters_of_its_own_or_launches_twice(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_program, "_NUMBER", 64)
    # The memory of this device is that of the CPU.
    eager = device.counters(8, "cpu")
    with graph_counters(torch.device("cpu")) as kept:
        device.capturing = True
        assert device.counters(64, "cpu") is kept
        assert device.counters(65, "cpu") is None
        assert device.counters(8, "cuda:1") is None
    device.capturing = False
    assert kept is not eager
    assert device.counters(8, "cpu") is eager


def test_a_capture_that_nobody_announced_launches_twice(device: Device) -> None:
    device.capturing = True
    assert device.counters(8) is None


def occupancy(row: dict[str, Any]) -> int:
    """Programs that an sm_90 multiprocessor holds: registers come by eights, shared memory takes 1 KiB a program."""
    registers = -(-row["registers"] // 8) * 8 * 32 * row["warps"]
    return int(min(65536 // registers, 228 * 1024 // (row["shared"] + 1024)))


def test_the_number_of_splits_follows_the_occupancy_that_was_compiled() -> None:
    """For attention of single tokens; a program more than fits at a time would double its time."""
    rows = json.loads(aot.TABLE.read_text(encoding="utf-8"))["rows"]
    seen = set()
    for key, row in rows.items():
        if not re.match(r"paged_attention decode .* \| attend_kernel 0 \| sm_90", key):
            continue
        config = Config({}, row["config"]["num_warps"], row["config"]["num_stages"])
        dtype = torch.float32 if "float32" in key else torch.bfloat16
        D = next((int(size) for size in re.findall(r"head (\d+)", key)), 128)
        expected = min(2, occupancy(row))
        assert programs_per_sm(config, dtype, D) == expected, key
        seen.add(expected)
    assert seen == {1, 2}
