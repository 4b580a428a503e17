"""Compiling ahead of time: what is compiled, which limits break, and when the committed table is out of date."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from trine.kernels import aot
from trine.kernels.launch import Launch
from trine.kernels.samples import Sample, meta
from trine.kernels.target import COMPILED
from trine.kernels.tuning import Config

CONFIG = Config({}, num_warps=4, num_stages=2)


@triton.jit
def _scale(x, factor):  # type: ignore[no-untyped-def]
    return x * factor


@triton.jit
def _kernel(x_ptr, y_ptr, rows, width, factor, flag, WIDE: tl.constexpr, LIKE: tl.constexpr = 7):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    x = _scale(tl.load(x_ptr + places, mask=places < rows * width), factor)
    if y_ptr is not None:
        tl.store(y_ptr + places, x, mask=places < rows * width)


@triton.jit(do_not_specialize=["rows", "width"])
def _any_size_kernel(x_ptr, rows, width, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, WIDE)
    tl.store(x_ptr + places, places, mask=places < rows * width)


@triton.jit
def _product_kernel(x_ptr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, WIDE)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    x = tl.load(x_ptr + places)
    tl.store(x_ptr + places, tl.dot(x, x).to(x.dtype))


@triton.jit
def _broken_kernel(x_ptr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr + tl.arange(0, WIDE), tl.zeros([WIDE, 2], dtype=tl.float32))


def make_launch(**changes: Any) -> Launch:
    arguments = {
        "x_ptr": meta(4, dtype=torch.bfloat16),
        "y_ptr": meta(4),
        "rows": 48,
        "width": 1,
        "factor": 0.5,
        "flag": True,
        "WIDE": 64,
    }
    return Launch(_kernel, (1,), {**arguments, **changes}, CONFIG, {})


def make_job(launch: Launch, target: str = "sm_90", **fields: Any) -> aot.Job:
    return aot.Job(Sample("thing", torch.bfloat16, lambda: None, **fields), target, 0, launch)


def test_arguments_are_specialised_as_triton_does() -> None:
    signature, constants, attributes = aot.specialised(make_launch())
    assert signature == {
        "x_ptr": "*bf16",
        "y_ptr": "*fp32",
        "rows": "i32",
        "width": "constexpr",
        "factor": "fp32",
        "flag": "u1",
        "WIDE": "constexpr",
        "LIKE": "constexpr",
    }
    assert constants == {"width": 1, "WIDE": 64, "LIKE": 7}
    assert set(attributes) == {(0,), (1,), (2,)}  # pointers, and 48 = 3 * 16

    signature, constants, attributes = aot.specialised(make_launch(y_ptr=None, rows=2**31, width=50))
    assert signature["y_ptr"] == "constexpr"
    assert constants["y_ptr"] is None
    assert signature["rows"] == "i64"
    assert set(attributes) == {(0,), (2,)}


def test_arguments_that_a_kernel_takes_as_they_come_are_not_specialised() -> None:
    arguments = {"x_ptr": meta(4), "rows": 48, "width": 1, "WIDE": 16}
    signature, constants, attributes = aot.specialised(Launch(_any_size_kernel, (1,), arguments, CONFIG, {}))
    assert signature == {"x_ptr": "*fp32", "rows": "i32", "width": "i32", "WIDE": "constexpr"}
    assert constants == {"WIDE": 16}
    assert set(attributes) == {(0,)}


def test_an_argument_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="argument rows of _kernel is a str"):
        aot.specialised(make_launch(rows="many"))


def test_a_launch_compiles_for_every_target() -> None:
    for target in COMPILED:
        row = aot.compile_job(make_job(make_launch(), target))
        assert "error" not in row, row
        assert row["problems"] == []
        assert row["registers"] > 0


def test_what_the_compiler_says_is_kept() -> None:
    row = aot.compile_job(make_job(Launch(_broken_kernel, (1,), {"x_ptr": meta(4), "WIDE": 16}, CONFIG, {})))
    assert "error" in row
    assert "problems" not in row


def test_the_hash_follows_everything_that_decides_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    first = aot.source_hash(make_job(make_launch()))
    assert aot.source_hash(make_job(make_launch(rows=64))) == first  # divisible by 16 as before
    others = [make_job(make_launch(rows=50)), make_job(make_launch(WIDE=32)), make_job(make_launch(), "sm_80")]
    others.append(make_job(Launch(_kernel, (1,), make_launch().arguments, Config({}, 8, 2), {})))
    others.append(make_job(Launch(_kernel, (1,), make_launch().arguments, CONFIG, {"maxnreg": 128})))
    hashes = [aot.source_hash(job) for job in others]
    assert len({first, *hashes}) == 6

    aot._sources.cache_clear()
    monkeypatch.setattr(aot, "_sources", lambda kernel: (kernel.src, _scale.src + "  # edited"))
    assert aot.source_hash(make_job(make_launch())) != first


def test_the_source_of_a_kernel_includes_what_it_calls() -> None:
    assert _scale.src in aot._sources(_kernel)


ROW = {"shared": 1000, "spills": 0, "matrix": 8, "async_copies": 4, "setmaxnreg": 0, "warps": 4}
PRODUCT = Launch(_product_kernel, (1,), {"x_ptr": meta(4, dtype=torch.bfloat16), "WIDE": 64}, CONFIG, {})


@pytest.mark.parametrize(
    ("target", "changes", "problem"),
    [
        ("sm_90", {}, None),
        ("sm_90", {"shared": 228 * 1024}, "shared memory"),
        ("gfx942", {"shared": 65 * 1024}, "shared memory"),
        ("sm_80", {"spills": 8}, "spilled"),
        ("sm_90", {"spills": 8}, "spilled"),
        ("sm_90", {"matrix": 0}, "no tensor-core instruction"),
        ("sm_80", {"async_copies": 0}, "no asynchronous copy"),
        ("sm_90", {"async_copies": 0}, None),
    ],
)
def test_limits(target: str, changes: dict[str, int], problem: str | None) -> None:
    found = aot._problems({**ROW, **changes}, make_job(PRODUCT, target, tensor_cores=True))
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1
        assert problem in found[0]


def test_only_kernels_with_a_product_need_tensor_cores() -> None:
    row = {**ROW, "matrix": 0, "async_copies": 0}
    assert aot._problems(row, make_job(make_launch(), "sm_80", tensor_cores=True)) == []
    assert aot._problems(row, make_job(PRODUCT, "sm_80", tensor_cores=False)) == []
    assert aot.compile_job(make_job(PRODUCT, "sm_90", tensor_cores=True))["matrix"] > 0


@pytest.mark.parametrize(("setmaxnreg", "warps", "good"), [(2, 12, True), (0, 12, False), (2, 4, False)])
def test_warps_with_roles_are_noticed_when_they_are_gone(setmaxnreg: int, warps: int, good: bool) -> None:
    row = {**ROW, "setmaxnreg": setmaxnreg, "warps": warps}
    found = aot._problems(row, make_job(PRODUCT, warp_specialized=True))
    assert (found == []) is good
    assert "wait for one another" in aot._problems({**row, "serialised": True}, make_job(PRODUCT))[0]


def test_a_table_that_is_out_of_date_fails(capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(make_launch())
    row = {"key": job.key, "hash": "new", **ROW, "registers": 20}
    version = triton.__version__

    def status(stored: dict[str, Any], triton_version: str = version) -> tuple[int, str]:
        found = aot._compare([job], [row], {"triton": triton_version, "rows": stored})
        return found, capsys.readouterr().out

    assert status({job.key: row}) == (0, "")
    assert status({}) == (1, f"FAIL aot.json: 1 rows changed since, first {job.key}; run make aot\n")
    assert "changed since" in status({job.key: {**row, "hash": "old"}})[1]
    assert "no longer launched" in status({job.key: row, "another": row})[1]
    assert "compiles differently" in status({job.key: {**row, "registers": 30}})[1]
    # Another compiler gives other registers; its rows still have to be there.
    assert status({job.key: {**row, "registers": 30}}, "0.0") == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "no_such"], "unknown name 'no_such'"),
        (["--targets", "sm_75"], "unknown name 'sm_75'"),
        (["--check", "--only", "x"], "--write and --check are about everything"),
    ],
)
def test_wrong_words_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        aot.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_every_launch_of_every_sample_is_in_the_committed_table() -> None:
    wanted = {job.key for job in aot.jobs(aot.Selection())}
    assert wanted == set(aot._stored()["rows"])
