"""Whole sweeps: a grid against the recipe a Ray user would write, and against a bare script.

    uv run python tests/benchmarks/sweeps.py --cifar FOLDER

`grid`: 8 prune ratios x 2 penalties on VGG16 at 1/8 width under the published rule, from the start
of the command until every ticket is drawn and proved, against rival A, whose images are in memory
as torchvision's CIFAR10 has them. All sides decode the files once in every run. `digits`: the same
on ResNet-20 and 1,000 of scikit-learn's digits, too small for VGG16's five poolings.
`floor`: six trajectories of a fixed number of epochs against rival C in two processes, which does
the same training, validation included, and nothing else; once as a whole, and once from the first
check (C: epoch) to the last, which leaves out the start of Python, Ray and workers.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import HEADER, interleave, machine, process_age, ratio, row

from raytickets.config import (
    Data,
    Network,
    Proof,
    Retraining,
    SearchSpace,
    StopRule,
    Training,
)

HERE = Path(__file__).parent
VGG16_8 = Network("cifar_vgg", {"depth": 16, "width": 0.125})
RESNET20 = Network("cifar_resnet", {"depth": 20})
PENALTIES = (1e-4, 1e-3)
RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RATE = 0.05


class _Over(Exception):
    pass


def space(data: str, limit: int, epochs: int, **fields) -> SearchSpace:
    """`data` is `digits` or a folder; as many validation images as a rival gets."""
    if data == "digits":
        network, share = RESNET20, limit / 10 / 1797
        images = Data("digits", limit=limit, validation=share, crop_padding=1)
    else:
        network, share = VGG16_8, limit / 10 / len(list((Path(data) / "train").rglob("*.*")))
        images = Data("folder", data, limit=limit, validation=share, crop_padding=4, flip=True)
    given = {
        "name": "benchmark",
        "network": network,
        "data": images,
        "penalties": PENALTIES,
        "prune_ratios": RATIOS,
        "training": Training(epochs=epochs, learning_rate=RATE),
        "retraining": Retraining(epochs=1),
        "stop_rule": StopRule("paper"),
    }
    return SearchSpace(**given | fields)


def run_ours(parsed: argparse.Namespace) -> None:
    """In a process of its own: search until the winners are known; the times as JSON."""
    from raytickets.driver import SweepFailed, search

    times: dict[str, float] = {}

    def observe(event: dict) -> None:
        if event["event"] == "check":
            times.setdefault("first_check", process_age())
            times["last_check"] = process_age()
        if event["event"] == "winners":
            times["seconds"] = process_age()
            print(json.dumps(times), flush=True)
            raise _Over

    fields = json.loads(parsed.fields)
    if "floor" in fields:
        chosen = space(
            parsed.data,
            parsed.limit,
            fields["floor"],
            penalties=tuple(fields["penalties"]),
            prune_ratios=(0.5,),
            stop_rule=StopRule(threshold=1e-9),
        )
    else:
        chosen = space(parsed.data, parsed.limit, parsed.epochs, proof=Proof(budget=0.25))
    with contextlib.suppress(SweepFailed):  # by what `observe` raises
        search(chosen, name="ours", storage=Path.cwd(), observer=observe)


def ours(parsed: argparse.Namespace, **fields) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--cifar", parsed.data]
        command += ["--limit", str(parsed.limit), "--epochs", str(parsed.epochs)]
        command += ["--fields", json.dumps(fields)]
        environment = os.environ | {"RAYTICKETS_CACHE": "off"}
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
    return json.loads(done.stdout.splitlines()[-1])


def rival(script: str, parsed: argparse.Namespace, *words: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / script), parsed.data, "--limit", str(parsed.limit)]
        command += ["--validation", str(parsed.limit // 10), "--learning-rate", str(RATE)]
        network = RESNET20 if parsed.data == "digits" else VGG16_8
        command += ["--network", network.name, "--options", json.dumps(network.options)]
        command += ["--out", folder, *words]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _grid(parsed: argparse.Namespace, title: str, goal: str) -> None:
    words = ["--penalties", *map(str, PENALTIES), "--ratios", *map(str, RATIOS)]
    words += ["--epochs", str(parsed.epochs), "--decoded"]

    def theirs() -> float:
        return rival("rival_tune.py", parsed, *words)["seconds_with_imports"]

    functions = {"ours": lambda: ours(parsed)["seconds"], "theirs": theirs}
    seconds = interleave(functions, parsed.runs, warm_up=False)
    times = ratio(seconds["theirs"], seconds["ours"])
    note = f"ours {min(seconds['ours']):.0f} to {max(seconds['ours']):.0f} s, proofs included"
    title = (
        f"grid of 8 ratios x 2 penalties, {title}, budget {parsed.epochs} epochs: A against ours"
    )
    print(row(title, goal, times, times.n, note), flush=True)


def grid(parsed: argparse.Namespace) -> None:
    _grid(parsed, f"VGG16/8, {parsed.limit:,} images", ">= 10")


def digits(parsed: argparse.Namespace) -> None:
    parsed = argparse.Namespace(**vars(parsed) | {"data": "digits", "limit": 1000})
    _grid(parsed, "ResNet-20, 1,000 digits", "")


def floor(parsed: argparse.Namespace) -> None:
    penalties = [1e-4 * place for place in range(1, 7)]
    halves = [[(penalty, parsed.floor) for penalty in penalties[half::2]] for half in (0, 1)]
    words = ["--epochs", str(parsed.floor), "--precision", "bfloat16", "--channels-last"]
    words += ["--processes", json.dumps(halves)]
    between: list[float] = []
    bare: list[float] = []

    def whole() -> float:
        times = ours(parsed, floor=parsed.floor, penalties=penalties)
        between.append(times["last_check"] - times["first_check"])
        return times["seconds"]

    def script() -> float:
        found = rival("rival_bare.py", parsed, *words)
        bare.append(found["between_seconds"])
        return found["seconds_with_imports"]

    seconds = interleave({"script": script, "ours": whole}, parsed.runs, warm_up=False)
    times = ratio(seconds["ours"], seconds["script"])
    trajectory = sum(bare) / len(bare) / 3
    title = f"sweep of 6 trajectories of {trajectory:.0f} s: wall against two bare processes"
    note = f"the script {min(seconds['script']):.0f} to {max(seconds['script']):.0f} s"
    print(row(title, "<= 1.05", times, times.n, note))
    inner = ratio(between, bare)
    print(row(f"{title}, without starting up", "", inner, inner.n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", default=["grid", "digits", "floor"])
    parser.add_argument("--cifar", dest="data", required=True)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=12, help="budget of the grid's trajectories")
    parser.add_argument("--floor", type=int, default=8, help="epochs of the floor's trajectories")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--fields", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.fields:
        return run_ours(parsed)
    started = time.monotonic()
    print(HEADER)
    for figure in parsed.figures:
        {"grid": grid, "digits": digits, "floor": floor}[figure](parsed)
    print("\n" + machine("ray"), f"after {time.monotonic() - started:.0f} s")
    return None


if __name__ == "__main__":
    main()
