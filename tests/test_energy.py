"""Where joules come from, and that unknown is never 0."""

import time
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from raytickets import energy
from raytickets.energy import Meter

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def no_rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "RAPL", tmp_path / "nothing")


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs, of which NVML calls the second one by its UUID; it has used 500 kJ and uses 250 J
    a reading. What was waited for before readings."""
    waited: list[torch.device] = []
    used = iter(range(500_000_000, 600_000_000, 250_000))
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-{index}")
    )
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", ["GPU-uuid-0", "GPU-uuid-1"].index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", ["NVIDIA A100", "NVIDIA H100"].__getitem__)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: handle * next(used)
    )
    return waited


def test_a_gpu_is_measured_once_its_work_is_done(synchronized: list[torch.device]):
    meter = Meter(GPU, watts=300)
    before = len(synchronized)
    assert meter.joules() == (
        250,
        "measured (energy counter of GPU 1, NVIDIA H100, all its processes)",
    )
    assert meter.joules()[0] == 500
    assert synchronized[before:] == [GPU, GPU]


@pytest.mark.usefixtures("synchronized")
def test_the_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Meter(torch.device("cuda"), None).joules()[0] == 250


@pytest.mark.usefixtures("synchronized")
def test_a_gpu_whose_counter_fails_is_estimated_or_unavailable_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(*_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", fail)
    assert Meter(GPU, None).joules() == (None, "unavailable (Not Supported)")
    joules, source = Meter(GPU, 300).joules()
    assert joules is not None
    assert source == "estimated (300 W from the search space x seconds)"


def rapl_zone(folder: Path, name: str, microjoules: int) -> Path:
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")
    return folder / "energy_uj"


def test_processors_are_measured_by_rapl_and_none_of_them_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = rapl_zone(tmp_path / "intel-rapl:0", "package-0", 7_000_000)
    memory = rapl_zone(tmp_path / "intel-rapl:0:0", "dram", 1_000_000)
    platform = rapl_zone(tmp_path / "intel-rapl:1", "psys", 9_000_000)
    monkeypatch.setattr(energy, "RAPL", tmp_path)

    meter = Meter(CPU, watts=65)
    package.write_text("19500000\n")
    memory.write_text("1500000\n")
    platform.write_text("30000000\n")
    what = "measured (RAPL, all processors and memory of the machine, all processes)"
    assert meter.joules() == (pytest.approx(13.0), what)


def test_a_processor_counter_that_starts_again_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = rapl_zone(tmp_path / "intel-rapl:0", "package-0", 262_143_000_000)
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    monkeypatch.setattr(energy, "RAPL_READING_S", 0.01)

    meter = Meter(CPU, None)
    for microjoules in (1_000_000, 262_000_000_000, 2_000_000):
        package.write_text(f"{microjoules}\n")
        time.sleep(0.2)
    joules, _ = meter.joules()
    assert joules == pytest.approx(0.328 + 1 + 261_999 + 143.328 + 2, abs=0.1)


@pytest.mark.usefixtures("no_rapl")
def test_without_a_counter_energy_is_watts_times_seconds():
    meter = Meter(CPU, watts=65)
    time.sleep(0.05)
    joules, source = meter.joules()
    assert joules is not None
    assert 65 * 0.05 <= joules < 65 * 5
    assert source == "estimated (65 W from the search space x seconds)"


@pytest.mark.usefixtures("no_rapl")
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_what_is_not_known_is_none_and_not_0(device: str):
    assert Meter(torch.device(device), None).joules() == (None, "unavailable")


@pytest.mark.usefixtures("no_rapl")
def test_a_meter_that_goes_on_counts_what_was_before():
    meter = Meter(CPU, watts=65)
    meter.go_on(100.0, 6500.0, "estimated (65 W)")
    joules, _ = meter.joules()
    assert joules is not None
    assert 6500 <= joules < 65 * 105
    assert 100 <= meter.seconds() < 105
    meter.go_on(100.0, None, "unavailable")
    assert meter.joules() == (None, "unavailable (a part was not counted)")


def test_what_was_estimated_in_part_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rapl_zone(tmp_path / "intel-rapl:0", "package-0", 0)
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    meter, measured = Meter(CPU, None), Meter(CPU, None).joules()[1]
    for before, source in (
        ((0.0, None), measured),
        ((5.0, measured), measured),
        ((5.0, "estimated (65 W)"), f"estimated (65 W) + {measured}"),
        ((5.0, f"estimated (65 W) + {measured}"), f"estimated (65 W) + {measured}"),
    ):
        meter.go_on(100.0, before[0], before[1] or measured)
        assert meter.joules() == (before[0], source)


def test_this_machine_is_measured_or_says_that_it_cannot_be():
    joules, source = Meter(CPU, None).joules()
    assert source.split(" (")[0] == ("unavailable" if joules is None else "measured")
