"""What the measurements share: interleaved runs, ratios with their spread, and table rows."""

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

HEADER = "| figure | must reach | measured | n | note |\n|---|---|---|---|---|"


def interleave(
    functions: Mapping[str, Callable[[], float]], runs: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Call each function `runs` times, round-robin, so that drift of the machine hits all alike.

    Each function returns its own figure, as seconds. Every other round goes in reverse order, so
    that none always follows the same one. `warm_up` calls each once before, uncounted.
    """
    if warm_up:
        for function in functions.values():
            function()
    measured: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(runs):
        for name in list(functions)[:: -1 if run % 2 else 1]:
            measured[name].append(figure := functions[name]())
            if figure > 5:
                print(f"round {run + 1} of {runs}, {name}: {figure:.1f} s", file=sys.stderr)
    return measured


def clocked(function: Callable[[], object]) -> Callable[[], float]:
    """The function as one that returns its wall seconds."""

    def run() -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return run


@dataclass(frozen=True)
class Ratio:
    """Of the medians, with the least and the greatest ratio of runs of the same round."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """How many times `below` goes into `above`; both are lists of one call of `interleave`."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(median(above) / median(below), min(pairs), max(pairs), len(pairs))


def row(figure: str, goal: str, measured: object, n: int | str, note: str = "") -> str:
    return f"| {figure} | {goal} | {measured} | {n} | {note} |"


def machine(*packages: str) -> str:
    """Processor, cores, load and versions, as one line."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, load"
        f" {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {versions}"
    )


def process_age() -> float:
    """Wall seconds since this process was started: what its imports took counts too."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
