"""Energy by counters: a false sysfs tree and a false driver, a clock of ours; what is unknown says why."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trine.engine.train.energy import EnergyMeter, co2e_grams, energy_line, format_energy, format_mass
from trine.engine.train.energy_counters import Counters, NvmlBoard, find_counters

CPU = torch.device("cpu")
RANGE = 262_143_328_850  # of Intel's counters, in microjoules


def zone(powercap: Path, folder: str, name: str, microjoules: int, largest: int = RANGE) -> Path:
    """A zone as Linux shows it."""
    made = powercap / folder
    made.mkdir(parents=True)
    (made / "name").write_text(name + "\n")
    (made / "max_energy_range_uj").write_text(f"{largest}\n")
    (made / "energy_uj").write_text(f"{microjoules}\n")
    return made


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two sockets; the first has memory counted apart, cores (part of the package), psys and a second interface."""
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 0, largest=65_532_610_987)
    zone(tmp_path, "intel-rapl:1", "package-1", RANGE - 1_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 7)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def advance(folder: Path, microjoules: int) -> None:
    """A counter goes on, and round at its end."""
    file, largest = folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())
    file.write_text(f"{(int(file.read_text()) + microjoules) % largest}\n")


def test_packages_and_memory_are_counted_once(machine: Path) -> None:
    counters = find_counters(CPU, machine)
    assert counters.described == "package-0, dram, package-1"
    assert counters.unknown is None
    assert counters.uncounted == []


def test_joules_over_steps_and_a_counter_that_goes_round(machine: Path) -> None:
    now = [0.0]
    meter = EnergyMeter(find_counters(CPU, machine), clock=lambda: now[0])
    now[0] = 50.0
    advance(machine / "intel-rapl:0", 99_000_000)  # before the run: not its own
    meter.start()
    for _ in range(3):
        now[0] += 2.0
        advance(machine / "intel-rapl:0", 40_000_000)
        advance(machine / "intel-rapl:0:1", 3_000_000)
        advance(machine / "intel-rapl:1", 600_000)  # passes its end in the second step
        meter.update()
    assert meter.joules == pytest.approx(3 * 43.6)
    assert (meter.measured_seconds, meter.seconds) == (6.0, 6.0)


def test_steps_do_not_ask_the_counters_more_than_once_a_second(machine: Path) -> None:
    now = [0.0]
    meter = EnergyMeter(find_counters(CPU, machine), clock=lambda: now[0])
    meter.start()
    seen = []
    for now[0] in (0.4, 0.9, 1.2, 1.6, 2.1, 2.3):
        advance(machine / "intel-rapl:0", 1_000_000)
        meter.keep_up()
        seen.append(meter.joules)
    assert seen == [0.0, 0.0, 3.0, 3.0, 3.0, 6.0]
    meter.update()
    assert (meter.joules, meter.measured_seconds) == (6.0, pytest.approx(2.3))


def test_a_counter_unread_for_so_long_that_it_may_have_gone_round_twice_is_not_believed(machine: Path) -> None:
    now = [0.0]
    meter = EnergyMeter(find_counters(CPU, machine), clock=lambda: now[0])
    meter.start()
    now[0] += 66.0  # 65,533 J of memory at no more than 1,000 W
    advance(machine / "intel-rapl:0", 1_000_000)
    meter.update()
    assert meter.known is None
    now[0] += 34.0
    advance(machine / "intel-rapl:0", 2_000_000)
    meter.update()
    assert (meter.known, meter.measured_seconds, meter.seconds) == (2.0, 34.0, 100.0)
    assert "measured over 34% of the time" in energy_line(meter.summary(473.0))


def test_a_run_that_goes_on_adds_to_what_it_spent(machine: Path) -> None:
    meter = EnergyMeter(find_counters(CPU, machine), clock=lambda: 0.0)
    meter.load_state((100.0, 30.0, 40.0))
    meter.start()
    advance(machine / "intel-rapl:0", 5_000_000)
    meter.update()
    assert meter.state == (105.0, 30.0, 40.0)


def test_counters_that_stop_answering_do_not_stop_the_run(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    meter = EnergyMeter(find_counters(CPU, machine), clock=lambda: now[0])
    meter.start()
    now[0] = 1.0
    advance(machine / "intel-rapl:0", 5_000_000)
    meter.update()
    (machine / "intel-rapl:1" / "energy_uj").unlink()
    for now[0] in (2.0, 3.0, 4.0):
        meter.update()
    assert meter.state == (5.0, 1.0, 4.0)
    assert capsys.readouterr().err.count("the run goes on without") == 1
    assert "stopped to answer" in energy_line(meter.summary(473.0))


def test_what_is_unknown_says_why(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = find_counters(CPU, tmp_path / "nowhere")
    assert nowhere.unknown is not None
    meter = EnergyMeter(nowhere, clock=lambda: 0.0)
    meter.start()
    meter.update()
    summary = meter.summary(473.0)
    assert (summary["joules"], summary["co2e_grams"]) == (None, None)
    assert energy_line(summary).startswith(f"energy unknown: there is no {tmp_path / 'nowhere'} (virtual machines")
    original = Path.read_text

    def read(path: Path, *arguments: Any) -> str:
        if path == machine / "intel-rapl:1" / "energy_uj":
            raise PermissionError(13, "Permission denied")
        return original(path, *arguments)

    monkeypatch.setattr(Path, "read_text", read)
    refused = find_counters(CPU, machine)
    assert refused.found == []  # one socket alone would look like both
    assert refused.unknown == f"{machine}/intel-rapl:1/energy_uj may be read by root only (chmod a+r, or run as root)"
    (tmp_path / "bare").mkdir()
    assert find_counters(CPU, tmp_path / "bare").unknown == f"{tmp_path}/bare has no counter of a processor package"


class FalseDriver:
    """NVML with one board, by its UUID."""

    def __init__(self, status: int = 0) -> None:
        self.millijoules, self.status, self.asked = 0, status, b""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, handle: Any) -> int:  # noqa: N802
        self.asked = uuid.value or b""
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, answer: Any) -> int:  # noqa: N802
        answer._obj.value = self.millijoules
        return self.status


def test_a_gpu_is_counted_by_its_driver(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, gpu = FalseDriver(), torch.device("cuda", 0)
    properties = SimpleNamespace(name="Some GPU", uuid="1234-ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    driver.millijoules = 10_000
    board = NvmlBoard(gpu)
    assert driver.asked == b"GPU-1234-ab"
    driver.millijoules = 17_500
    assert board.read() == 17.5
    assert find_counters(gpu, machine).described == "Some GPU, package-0, dram, package-1"
    driver.status = 3
    found = find_counters(gpu, machine)
    assert found.described == "package-0, dram, package-1"
    assert found.uncounted[0].startswith("the GPU's energy cannot be read by NVML (nvmlDeviceGetTotalEnergyConsumption")


def test_figures_in_words() -> None:
    assert co2e_grams(3.6e6, 473.0) == 473.0
    assert [format_energy(joules) for joules in (850.0, 12_340.0, 5.4e6)] == ["850 J", "12.3 kJ", "1.5 kWh"]
    assert [format_mass(grams) for grams in (0.1234, 34.4, 1234.0)] == ["0.12 g", "34.4 g", "1.23 kg"]
    meter = EnergyMeter(Counters([], []), joules=7.2e6, measured_seconds=10.0, seconds=10.0)
    assert "energy 2 kWh by the counters of" in energy_line(meter.summary(100.0))
    assert "200 g CO2e at 100 g/kWh" in energy_line(meter.summary(100.0))
