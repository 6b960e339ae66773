"""Energy: a counter's where one can be read, else an estimate, and never 0 for what is not known.

The only module that knows NVML, through NVIDIA's own bindings. Zeus reads the same counters, but
brings amdsmi, next to which Ray does not start on machines without ROCm (zeus 0.16, ray 2.60).
"""

import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pynvml
import torch

RAPL = Path("/sys/class/powercap")
"""Where Linux keeps the counters of processors, AMD's too (its docs: power/powercap)."""
RAPL_READING_S = 20.0
"""Those counters start at 0 again, the smallest after 65 kJ, which is a minute at 1,000 W."""


class Meter:
    """The energy of one device since the meter was made.

    An NVIDIA GPU has the energy counter of its driver (NVML, from Volta on), a processor RAPL,
    which often root alone may read. Both count all that the device did, for whatever process, and
    idle power too. NVML's counter moves every 20 to 100 ms: measure whole phases
    of many seconds, as a window below one second misleads. Making a meter and reading it wait for
    the GPU's queued work.
    """

    def __init__(self, device: torch.device, watts: float | None):
        """`watts` is what to estimate with where nothing can be measured."""
        self._watts = watts
        self._counter, self._source = _counter(device)
        self._first = self._counter() if self._counter else 0.0
        self._started = time.monotonic()
        self._before: tuple[float, float | None, str] = (0.0, 0.0, "")

    def seconds(self) -> float:
        return self._before[0] + time.monotonic() - self._started

    def go_on(self, seconds: float, joules: float | None, source: str) -> None:
        """Count in what an earlier meter of the same work told."""
        self._before = (seconds, joules, source)

    def joules(self) -> tuple[float | None, str]:
        """What was used so far, and how that is known.

        `measured (...)` names the counter, `estimated (...)` is `watts` x seconds, and with None
        comes `unavailable`, followed by the reason where a counter should be there but failed.
        """
        _, before, known = self._before
        if before is None and (self._counter or self._watts is not None):
            return None, "unavailable (a part was not counted)"
        if self._counter:
            joules, here = self._counter() - self._first, f"measured ({self._source})"
            sources = [*known.split(" + "), here] if before else [here]
            return (before or 0.0) + joules, " + ".join(dict.fromkeys(sources))
        if self._watts is not None:
            joules = self._watts * self.seconds()
            return joules, f"estimated ({self._watts:g} W from the search space x seconds)"
        return None, f"unavailable ({self._source})" if self._source else "unavailable"


def _counter(device: torch.device) -> tuple[Callable[[], float] | None, str]:
    """What reads a device's counter in joules, and its name; else None, and what went wrong."""
    if device.type == "cuda":
        try:
            return _gpu(device)
        except pynvml.NVMLError as error:
            return None, str(error)
    if device.type == "cpu" and (processors := _processors(RAPL)):
        return processors.joules, f"RAPL, all {processors.what} of the machine, all processes"
    return None, ""


def _gpu(device: torch.device) -> tuple[Callable[[], float], str]:
    index = torch.cuda.current_device() if device.index is None else device.index
    pynvml.nvmlInit()
    # By its UUID: NVML also numbers the GPUs that CUDA_VISIBLE_DEVICES hides.
    uuid = torch.cuda.get_device_properties(index).uuid
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read() -> float:
        torch.cuda.synchronize(device)
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

    read()
    name = pynvml.nvmlDeviceGetName(handle)
    return read, f"energy counter of GPU {index}, {name}, all its processes"


class _Processors:
    """All processors and their memory; a thread of its own sees their counters start again."""

    def __init__(self, zones: list[Path]):
        memory = any(_name(zone) == "dram" for zone in zones)
        self.what = "processors and memory" if memory else "processors"
        self._zones = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        self._last = {zone: _microjoules(zone) for zone in zones}
        self._total, self._lock = 0, threading.Lock()
        threading.Thread(target=self._watch, name="rapl", daemon=True).start()

    def joules(self) -> float:
        with self._lock:
            for zone, largest in self._zones.items():
                now = _microjoules(zone)
                self._total += (now - self._last[zone]) % (largest + 1)
                self._last[zone] = now
            return self._total / 1e6

    def _watch(self) -> None:
        while True:
            time.sleep(RAPL_READING_S)
            self.joules()


@functools.cache
def _processors(rapl: Path) -> _Processors | None:
    """One for each process; None if there are no counters, or if they may not be read."""
    # Beside the packages there may be a zone for the whole platform, which counts them again.
    zones = [
        zone
        for zone in sorted(rapl.glob("intel-rapl:*"))
        if _name(zone).startswith("package") or _name(zone) == "dram"
    ]
    readable = all(os.access(zone / "energy_uj", os.R_OK) for zone in zones)
    return _Processors(zones) if zones and readable else None


def _name(zone: Path) -> str:
    return (zone / "name").read_text().strip()


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())
