"""The driver is killed with SIGKILL at random moments, and the same command is given again at once.

    uv run python tests/faults/kills.py --folder EMPTY

Every other moment is drawn uniformly from the duration of an undisturbed sweep, counted from the
command's start; the others from the steps that are left to train, so that more kills strike within
epochs. Counted are the steps that were trained again, for each trajectory and retraining and each
kill. In the end weights, tickets, winners and MLflow must be those of the undisturbed sweep.
"""

import argparse
import itertools
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from suite import command, differences, recorded, result

BATCH, RETRAINING = 32, 6
SPACE = f"""
from raytickets.config import *

def space():
    return SearchSpace(
        name="tiny",
        network=Network("cifar_vgg", {{"depth": 9, "width": 1.0}}),
        data=Data("digits", validation=0.1, test=0.25),
        penalties=(1e-4, 3e-4, 1e-3),
        prune_ratios=(0.3, 0.5),
        training=Training(epochs=20, batch_size={BATCH}, learning_rate=0.02),
        stop_rule=StopRule(window=4, threshold=0.06),
        proof=Proof(budget=0.5, batch_size={BATCH}),
        retraining=Retraining(
            epochs={RETRAINING}, batch_size={BATCH}, learning_rate=0.02, num_workers=1
        ),
        winners=2,
    )
"""
LONGEST_S = 900
MOST_EPOCHS = 1
"""To be trained again after a kill by one trajectory or retraining."""


@dataclass(frozen=True)
class Stretch:
    """What one process trained of a run, from the end of epoch `first` on."""

    run: str
    first: int
    steps: int
    began: int
    ended: int
    """Both in ns; the latter is the last step's time."""


@dataclass(frozen=True)
class Repeat:
    """What of a run was trained again after the driver was killed."""

    run: str
    epochs: float
    """With the share of the epoch that was cut off."""
    whole: int
    """Epochs that had been trained to their end."""


def stretches(folder: Path) -> dict[str, list[Stretch]]:
    """By run, the earliest first."""
    found: dict[str, list[Stretch]] = {}
    for path in sorted(folder.glob("faults/steps/*")):
        began, run, first = path.name.split("@")
        seen = path.stat()
        stretch = Stretch(run, int(first), seen.st_size, int(began), seen.st_mtime_ns)
        found.setdefault(run, []).append(stretch)
    return found


def position(stretch: Stretch, epoch: int) -> int:
    """The steps of the run that are done at a stretch's end."""
    return stretch.first * epoch + stretch.steps


def done(folder: Path, epoch: int) -> int:
    """Steps of all runs, what was trained again counted once."""
    return sum(position(own[-1], epoch) for own in stretches(folder).values())


def repeats(folder: Path, epoch: int) -> list[Repeat]:
    """For every time that a run went on."""
    found = []
    for run, own in stretches(folder).items():
        for before, after in itertools.pairwise(own):
            end = position(before, epoch)
            again = end / epoch - after.first
            found.append(Repeat(run, again, end // epoch - after.first))
    return found


def at_once(folder: Path) -> list[str]:
    """Runs that a worker which outlived its driver trained while the next one did."""
    return [
        f"{run} was trained by two workers at once"
        for run, own in stretches(folder).items()
        if any(a.ended > b.began for a, b in itertools.pairwise(own))
    ]


def start(folder: Path) -> subprocess.Popen:
    (folder / "faults/steps").mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(**command(folder, [], SPACE), stdout=output, stderr=output)


def disturbed(
    folder: Path, kills: int, chance: random.Random, usual: tuple[float, int], epoch: int
) -> tuple[int, int]:
    """How many kills struck a sweep before it was done, and its exit code then.

    `usual` are the seconds and steps of an undisturbed one.
    """
    seconds, steps = usual
    struck, code = 0, 0
    for struck in range(kills + 1):
        before = done(folder, epoch)
        by_time = struck == kills or struck % 2 == 1 or before == steps
        moment = chance.uniform(0, seconds) if by_time else chance.randint(before + 1, steps)
        moment = LONGEST_S if struck == kills else moment
        process, began = start(folder), time.monotonic()
        while process.poll() is None:
            if (time.monotonic() - began if by_time else done(folder, epoch)) >= moment:
                break
            time.sleep(0.02)
        process.kill()
        code = process.wait()
        if code != -signal.SIGKILL:
            break
        passed = time.monotonic() - began
        print(f"killed after {passed:.1f} s, {done(folder, epoch)} of {steps} steps", flush=True)
    return struck, code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="an empty one to work in")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    root, chance = given.folder.resolve(), random.Random(given.seed)

    began = time.monotonic()
    _, code = disturbed(root / "undisturbed", 0, chance, (0.0, 0), 1)
    assert code == 0, (root / "undisturbed/output.txt").read_text()
    seconds, alone = time.monotonic() - began, stretches(root / "undisturbed")
    expected = result(root / "undisturbed"), recorded(root / "undisturbed")
    epoch = alone["dense"][0].steps // RETRAINING
    steps = done(root / "undisturbed", epoch)
    print(f"undisturbed: {seconds:.0f} s, {steps} steps, {epoch} in an epoch", flush=True)
    for run, own in alone.items():
        took = (own[0].ended - own[0].began) / 1e9
        print(f"  {run}: {own[0].steps // epoch} epochs, {took:.1f} s")

    struck, sweeps, wrong, again = 0, 0, [], []
    while struck < given.kills:
        folder = root / str(sweeps)
        some, code = disturbed(folder, given.kills - struck, chance, (seconds, steps), epoch)
        struck, sweeps = struck + some, sweeps + 1
        found = at_once(folder)
        if code == 0:
            found += differences(folder, expected)
            found += ["not every step was trained"] if done(folder, epoch) != steps else []
        else:
            found.append(f"exit code {code}: {(folder / 'output.txt').read_text()[-400:]}")
        repeated = repeats(folder, epoch)
        print(f"sweep {sweeps}, {some} kills:", *found or ["results as undisturbed"], sep="\n  ")
        for one in repeated:
            print(f"  again {one.run}: {one.epochs:.2f} epochs, {one.whole} whole", flush=True)
        wrong += found
        again += repeated
    most = max(again, key=lambda repeat: repeat.epochs, default=Repeat("none", 0.0, 0))
    over = [repeat for repeat in again if repeat.epochs > MOST_EPOCHS]
    print(
        f"\n{struck} kills in {sweeps} sweeps; {len(again)} trajectories and retrainings went on, "
        f"with {sum(repeat.epochs for repeat in again):.1f} epochs trained again; at most "
        f"{most.epochs:.2f} after one kill ({most.run}), more than {MOST_EPOCHS} in {len(over)}; "
        f"{len(wrong)} things wrong"
    )
    return bool(wrong or over)


if __name__ == "__main__":
    sys.exit(main())
