"""Seeded faults in real processes: small sweeps are disturbed, and run again until they are done.

    uv run python tests/faults/suite.py --faults 200 --folder EMPTY     # about an hour on 2 cores

Every sweep gets several faults of several kinds (see injector/sitecustomize.py). After each, its
command is run again, as a person would. In the end the tickets, retrained weights and results must
be those of an undisturbed sweep, MLflow must hold each once, and no exit code may have lied.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "injector"))
from sitecustomize import PLACES

INJECTOR = Path(__file__).parent / "injector"
SPACE = """
from raytickets.config import *

def space():
    return SearchSpace(
        name="tiny",
        network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
        data=Data("digits", validation=0.1, test=0.25, limit=300),
        penalties=(1e-4, 1e-3),
        prune_ratios=(0.3, 0.5),
        training=Training(epochs=8, batch_size=32, learning_rate=0.05),
        stop_rule=StopRule(window=3, threshold=0.7),
        proof=Proof(budget=0.5, batch_size=32),
        retraining=Retraining(epochs=3, batch_size=32, learning_rate=0.05, num_workers=1),
        winners=2,
    )
"""
DRIVER_KILLED = {kind for kind, (_, place, _) in PLACES.items() if place == "Journal.append"} - {
    "driver stopped",
    "disk full at the journal",
}
MOST_RUNS = 12
"""Of one command, before a sweep counts as stuck."""


@dataclass(frozen=True)
class Fault:
    kind: str
    at: int


@dataclass(frozen=True)
class Disturbed:
    """What became of a sweep."""

    faults: list[Fault]
    struck: list[Fault]
    codes: list[int]
    wrong: list[str]


def command(folder: Path, faults: list[Fault], space: str = SPACE) -> dict:
    """The command that begins or goes on with a sweep in a folder, as `subprocess` takes it."""
    (folder / "faults").mkdir(parents=True, exist_ok=True)
    (folder / "tiny.py").write_text(space)
    (folder / "faults/plan.json").write_text(json.dumps([vars(fault) for fault in faults]))
    environment = os.environ | {
        "RAYTICKETS_FAULTS": str(folder / "faults"),
        "PYTHONPATH": str(INJECTOR),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "OMP_NUM_THREADS": "1",
    }
    words = [Path(sys.executable).parent / "raytickets", "search", "tiny.py", "--name", "it"]
    return {"args": words, "cwd": folder, "env": environment}


def run(folder: Path, faults: list[Fault]) -> tuple[int, str]:
    """The command once; its exit code and what it wrote."""
    done = subprocess.run(**command(folder, faults), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def result(folder: Path) -> dict[str, object]:
    """What must not depend on faults: tickets, weights, winners and what was measured."""
    from raytickets.sweep import Sweep
    from raytickets.ticket import WEIGHTS, load_ticket

    sweep = Sweep(folder / "sweeps/it")
    report = sweep.report()
    # Winners that were retrained before a trajectory that had failed ran again stay as well.
    folders = [sweep.path / t["path"] for t in report["tickets"]]
    folders += [sweep.path / row["path"] for row in report["winners"]]
    weights = [load_ticket(folder).path / WEIGHTS for folder in folders]
    return {
        "weights": sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in weights),
        "tickets": sorted(
            (t["ticket"], t["draw_epoch"], t["proof_accuracy"]) for t in report["tickets"]
        ),
        "winners": [
            (row["run"], row["validation_accuracy"], row["test_accuracy"])
            for row in report["winners"]
        ],
        "trajectories": sorted(
            (t["trajectory"], t["state"], t["epochs"]) for t in report["trajectories"]
        ),
    }


def recorded(folder: Path) -> Counter[tuple[str, ...]]:
    """How often MLflow has each run and each point of each run, under names that a rerun keeps."""
    database = sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)
    tag = (
        "(select value from tags t where t.run_uuid = r.run_uuid and t.key = 'raytickets.{}')"
    ).format
    runs = database.execute(f"select {tag('kind')}, {tag('run')} from runs r").fetchall()
    # What is known only at an end is told again at a later end; MLflow shows the latest.
    series = database.execute(
        f"select {tag('kind')}, {tag('run')}, m.key, m.step, m.value from metrics m"
        " join runs r on r.run_uuid = m.run_uuid where m.step > 0"
    ).fetchall()
    latest = database.execute(
        f"select {tag('kind')}, {tag('run')}, m.key, m.value from latest_metrics m"
        " join runs r on r.run_uuid = m.run_uuid"
    ).fetchall()
    rows = [*runs, *(row for row in [*series, *latest] if not re.search("seconds|retries", row[2]))]
    return Counter(tuple(map(str, row)) for row in rows if row[0] != "None")


def differences(folder: Path, expected: tuple[dict, Counter]) -> list[str]:
    """Between a sweep that is done and the `result` and `recorded` of the undisturbed one."""
    found, points = result(folder), recorded(folder)
    wrong = [f"{name} differ" for name in found if found[name] != expected[0][name]]
    missing, doubled = expected[1] - points, [row for row in points if points[row] > 1]
    wrong += [f"MLflow misses {len(missing)}: {list(missing)[:3]}"] if missing else []
    wrong += [f"MLflow has {len(doubled)} twice: {doubled[:3]}"] if doubled else []
    return wrong


def disturb(folder: Path, faults: list[Fault], expected: tuple[dict, Counter]) -> Disturbed:
    """Run a sweep with these faults until it is done, and compare it with the undisturbed one."""
    codes, wrong, before = [], [], set()
    while not codes or (codes[-1] != 0 and len(codes) < MOST_RUNS):
        code, said = run(folder, faults)
        codes.append(code)
        struck = {n for n in range(len(faults)) if (folder / f"faults/struck-{n}").exists()}
        kinds = {faults[number].kind for number in struck - before}
        before = struck
        allowed = {0, 3}
        allowed |= {-9} if kinds & DRIVER_KILLED else set()
        allowed |= {130} if "driver stopped" in kinds else set()
        if code not in allowed:
            wrong.append(f"exit code {code} after {sorted(kinds)}: {said[-400:]}")
        if code == 3 and not kinds:
            wrong.append(f"exit code 3 without a fault: {said[-400:]}")
    if codes[-1] != 0:
        wrong.append(f"not done after {len(codes)} runs: {said[-400:]}")
    else:
        wrong += differences(folder, expected)
    return Disturbed(faults, [faults[number] for number in sorted(before)], codes, wrong)


def undisturbed(folder: Path) -> tuple[tuple[dict, Counter], dict[str, int]]:
    """A sweep without faults, and how often it comes to the place of each kind of fault."""
    code, said = run(folder, [Fault(kind, 10**9) for kind in PLACES])
    assert code == 0, said
    calls = {kind: folder / "faults" / kind.replace(" ", "-") for kind in PLACES}
    return (
        (result(folder), recorded(folder)),
        {kind: path.stat().st_size for kind, path in calls.items()},
    )


def draw(seed: int, calls: dict[str, int], count: int) -> list[Fault]:
    """Faults of different kinds, each somewhere within the sweep."""
    generator = random.Random(seed)
    kinds = generator.sample(sorted(calls), count)
    return [Fault(kind, generator.randint(1, calls[kind])) for kind in kinds]


def campaign(folder: Path, faults: int, each: int, seed: int) -> Iterator[Disturbed]:
    """Disturbed sweeps until so many faults have struck."""
    expected, calls = undisturbed(folder / "undisturbed")
    struck = 0
    while struck < faults:
        one = disturb(folder / str(seed), draw(seed, calls, each), expected)
        struck += len(one.struck)
        seed += 1
        yield one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--each", type=int, default=5, help="faults in one sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="an empty one to work in")
    given = parser.parse_args()
    kinds, codes, wrong = Counter(), Counter(), []
    for one in campaign(given.folder.resolve(), given.faults, given.each, given.seed):
        kinds.update(fault.kind for fault in one.struck)
        codes.update(one.codes)
        wrong += one.wrong
        print(f"{kinds.total()} faults, exit codes {one.codes}", *one.wrong, sep="\n  ", flush=True)
    print("\n| fault | times |\n|---|---|")
    print(*(f"| {kind} | {kinds[kind]} |" for kind in PLACES), sep="\n")
    print(f"\nexit codes {dict(codes)}; {len(wrong)} things wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
