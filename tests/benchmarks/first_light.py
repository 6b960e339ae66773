"""The README's table: the default sweep at three seeds, each as a user runs it.

    uv run python tests/benchmarks/first_light.py

Runs `raytickets search` in a fresh folder for each seed, on spaces that differ from the built-in
`digits` in the seed alone, and prints Markdown. Wall times are of the whole command.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

SEEDS = (0, 1, 2)

SPACE = """
import dataclasses
from raytickets import load_space

def space():
    return dataclasses.replace(load_space("digits"), seeds=({seed},))
"""


def run(seed: int, folder: Path) -> tuple[float, dict]:
    """One sweep: its wall time in seconds and its report."""
    (folder / "space.py").write_text(SPACE.format(seed=seed))
    raytickets = [sys.executable, "-m", "raytickets.cli"]
    started = time.monotonic()
    subprocess.run(
        [*raytickets, "search", "space.py", "--name", "sweep"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - started
    found = subprocess.run(
        [*raytickets, "report", "sweep", "--json"], cwd=folder, check=True, capture_output=True
    )
    return seconds, json.loads(found.stdout)


def main() -> None:
    print(
        "| seed | network | prune ratio | drawn at epoch | test accuracy | MACs | params | cost |"
    )
    print("|---|---|---|---|---|---|---|---|")
    lines = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            seconds, report = run(seed, Path(folder))
        dense = report["dense"]
        for row in [dense, *report["winners"]]:
            name = "dense" if row is dense else "ticket"
            ratio, draw = (
                f"{row[key]:g}" if row[key] else "" for key in ("prune_ratio", "draw_epoch")
            )
            macs, params = row["macs"] / dense["macs"], row["params"] / dense["params"]
            print(
                f"| {seed} | {name} | {ratio} | {draw} | {row['test_accuracy']:.2%} | {macs:.0%}"
                f" | {params:.0%} | {row['relative_cost']:.0%} |",
                flush=True,
            )
        kept = [
            row
            for row in report["winners"]
            if row["macs"] <= 0.6 * dense["macs"]
            and row["test_accuracy"] >= dense["test_accuracy"] - 0.005
        ]
        lines.append(
            f"seed {seed}: {seconds:.0f} s; {len(kept)} of {len(report['winners'])} winners within"
            f" 0.5 points of dense at <= 60 % of its MACs; search and all retraining together"
            f" {report['sweep_cost']:.0%} of one dense training,"
            f" {report['without_halving']:.0%} with every ticket retrained and none proved"
        )
    print("\n" + "\n".join(lines))
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "torch-pruning"))
    print(
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}, {packages}"
    )


if __name__ == "__main__":
    main()
