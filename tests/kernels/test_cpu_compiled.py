"""Where Numba is and is not: one reason, logged once; nothing heavy at import; a cache that follows the sources."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trine.kernels.cpu import compiled

ROOT = Path(__file__).resolve().parents[2]
needs_numba = pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")


@pytest.fixture
def asked_anew() -> Any:
    compiled.why_not.cache_clear()
    yield
    compiled.why_not.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_the_reason_against_numba_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)  # as if not installed
    with caplog.at_level(logging.WARNING):
        assert [compiled.available() for _ in range(3)] == [False] * 3
    assert len(caplog.records) == 1
    assert "numba cannot be imported" in caplog.text


@pytest.mark.usefixtures("asked_anew")
def test_numba_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "USING_NUMBA", False)
    assert compiled.why_not() == "TRINE_NUMBA=0"


def test_numba_is_imported_when_it_is_used_and_not_before() -> None:
    code = (
        "import sys, trine.kernels.paged_attention.op, trine.kernels.cpu.matvec, trine.kernels.cpu.layer\n"
        "import trine.kernels.cpu.kv_write, trine.kernels.cpu.table\n"
        "sys.exit('numba' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


@needs_numba
def test_missing_openmp_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "numba.np.ufunc.omppool", None)
    compiled.has_openmp.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [compiled.has_openmp() for _ in range(2)] == [False] * 2
    compiled.has_openmp.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "libgomp1" in caplog.text


@needs_numba
def test_code_is_kept_where_it_may_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numba

    compiled._cache_folder.cache_clear()
    try:
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "new"))
        folder = compiled._cache_folder()
        assert folder is not None
        assert folder.parent == tmp_path / "new"
        (tmp_path / "file").touch()
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))
        compiled._cache_folder.cache_clear()
        assert compiled._cache_folder() is None
        double = compiled.serial(lambda x: x * 2)
        assert double(3) == 6
    finally:
        compiled._cache_folder.cache_clear()


@needs_numba
def test_compiling_is_said_once_and_not_where_the_code_is_kept(tmp_path: Path) -> None:
    code = (
        "import numpy as np\n"
        "from trine.kernels.cpu.compiled import available\n"
        "assert available()\n"
        "from trine.kernels.cpu.numbers_loops import exponential, to_bf16\n"
        "exponential(np.float32(1)), to_bf16(np.float32(1))\n"
    )
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        said.append(done.stderr)
    [line] = said[0].splitlines()
    assert line.startswith("compiling loops for this CPU")
    assert str(tmp_path) in line
    assert said[1] == ""


def test_flat_memory_holds_all_of_a_view() -> None:
    x = torch.arange(60.0).view(3, 4, 5)[1:, ::2, 1:4]
    assert np.array_equal(compiled.flat(x), np.arange(21.0, 21.0 + 20 + 10 + 3))
    assert compiled.flat(torch.empty(0, 3)).shape == (0,)
    bits = compiled.array(torch.tensor([1.0, -2.0]).bfloat16())
    assert bits.tolist() == [0x3F80, 0xC000]


@needs_numba
def test_the_exponential_is_good_to_two_units() -> None:
    from trine.kernels.cpu.numbers_loops import exponential

    x = torch.cat((torch.linspace(-87, 0, 4001), torch.linspace(0, 87, 1001)))
    found = torch.tensor([exponential(np.float32(v)) for v in x.tolist()], dtype=torch.float64)
    exact = x.double().exp()
    assert float(((found - exact) / exact).abs().max()) < 2.5e-7
    assert exponential(np.float32(-1000)) < 1e-37
    assert exponential(np.float32("nan")) != exponential(np.float32("nan"))


@needs_numba
def test_bf16_is_rounded_as_torch_rounds() -> None:
    from trine.kernels.cpu.numbers_loops import to_bf16

    generator = torch.Generator().manual_seed(0)
    x = torch.cat((torch.randn(500, generator=generator), torch.tensor([1.00390625, 1.01171875, 3.4e38, 0.0, -0.0])))
    found = torch.tensor([int(to_bf16(np.float32(v))) for v in x.tolist()], dtype=torch.int32)
    assert torch.equal(found, x.bfloat16().view(torch.uint16).to(torch.int32))
    assert int(to_bf16(np.float32("nan"))) == 0x7FC0
