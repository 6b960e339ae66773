"""What sharing a trajectory among prune ratios saves, and that it changes no ticket.

    uv run python tests/benchmarks/sharing.py --cifar FOLDER

One trajectory with 8 prune ratios against 8 trajectories with one ratio each; the most that could
be saved is K times the mean of the stops over the greatest. Float32, one thread, no rounding, no
Ray; proofs of one step, as they are the same on both sides. Fails unless the tickets of both are
bit-identical.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch
from timing import HEADER, interleave, machine, ratio, row

from raytickets.config import Data, Network, Proof, Retraining, SearchSpace, StopRule, Training
from raytickets.data import load_data
from raytickets.journal import Event
from raytickets.sweep import select
from raytickets.ticket import WEIGHTS, load_ticket
from raytickets.trajectory import Point, prepare, run_trajectory

RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def tickets(space: SearchSpace, dataset, folder: Path) -> tuple[list[Event], dict]:
    """Events of one trajectory, and of each ticket its ratio with mask and hash of the weights."""
    setting = prepare(space, dataset, folder)
    events = [event for some in run_trajectory(setting, Point(1e-3, 0)) for event in some]
    found = {}
    for event in select(events, "ticket"):
        manifest = load_ticket(folder / event["path"]).manifest
        masks = [group["mask"] for group in manifest["groups"]]
        found[event["prune_ratio"]] = masks, manifest["files"][WEIGHTS]
    return events, found


def measure(space: SearchSpace, title: str, runs: int) -> None:
    dataset = load_data(space.data)
    stops: dict[float, int] = {}
    together: dict = {}
    apart: dict = {}

    def shared() -> float:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            events, found = tickets(space, dataset, Path(folder))
            seconds = time.perf_counter() - started
        last = select(events, "trajectory")[0]["epochs"]
        stops.update(dict.fromkeys(RATIOS, last))
        stops.update({e["prune_ratio"]: e["draw_epoch"] for e in select(events, "ticket")})
        together.update(found)
        return seconds

    def alone() -> float:
        seconds = 0.0
        for p in RATIOS:
            with tempfile.TemporaryDirectory() as folder:
                single = dataclasses.replace(space, prune_ratios=(p,))
                started = time.perf_counter()
                _, found = tickets(single, dataset, Path(folder))
                seconds += time.perf_counter() - started
            apart.update(found)
        return seconds

    seconds = interleave({"shared": shared, "alone": alone}, runs, warm_up=False)
    if together != apart or not together:
        raise SystemExit("the tickets of shared and independent trajectories differ")
    possible = sum(stops.values()) / max(stops.values())
    saved = ratio(seconds["alone"], seconds["shared"])
    drawn = f"{len(together)} of {len(RATIOS)} ratios drew, tickets bit-identical"
    note = f"{saved} of the possible {possible:.2f} times; {drawn}"
    title = f"sharing, {title}: saving over the possible K x mean/max"
    print(row(title, ">= 0.95", f"{saved.value / possible:.3f}", saved.n, note), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--limit", type=int, default=640)
    parser.add_argument("--runs", type=int, default=5)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    space = SearchSpace(
        name="sharing",
        network=Network("cifar_vgg", {"depth": 16, "width": 0.125}),
        data=Data("folder", parsed.cifar, limit=parsed.limit, crop_padding=4, flip=True),
        penalties=(1e-3,),
        prune_ratios=RATIOS,
        training=Training(epochs=30, learning_rate=0.05),
        proof=Proof(budget=1e-9),
        retraining=Retraining(epochs=1),
        stop_rule=StopRule("paper"),
        round_to=1,
        precision="float32",
    )
    network, data = Network("cifar_resnet", {"depth": 20}), Data("digits", crop_padding=1)
    print(HEADER)
    measure(space, f"VGG16/8, {parsed.limit:,} images", parsed.runs)
    measure(
        dataclasses.replace(space, network=network, data=data), "ResNet-20, digits", parsed.runs
    )
    print("\n" + machine())


if __name__ == "__main__":
    main()
