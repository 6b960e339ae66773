"""TPE against random search at equal budget: the hypervolume of all tickets that a sweep finds.

    uv run python tests/benchmarks/proposals.py --cifar FOLDER

For each seed two sweeps of the same space and as many trajectories, one after the other as with one
slot, without Ray and without retraining: proposals, trajectories, proofs and what the study is told
are a sweep's own. A seed is that of the sampler and of the training; the first `--startup` points
of TPE are drawn at random and are those of random search. The figure is the hypervolume of all the
tickets of a sweep in proof accuracy and share of the MACs of the space's own network, on validation
images; the interval is Student's, of the paired differences. Processes have one thread each.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from optuna.trial import TrialState
from scipy.stats import t as student
from timing import machine

from raytickets import study
from raytickets.config import (
    Data,
    Network,
    Optuna,
    Proof,
    Range,
    Retraining,
    Sampler,
    SearchSpace,
    StopRule,
    Training,
)
from raytickets.data import load_data
from raytickets.halving import hypervolume
from raytickets.sweep import select
from raytickets.trajectory import prepare, run_trajectory

SAMPLERS: tuple[Sampler, ...] = ("tpe", "random")


def space(given: argparse.Namespace, sampler: Sampler, seed: int) -> SearchSpace:
    return SearchSpace(
        name="proposals",
        network=Network("cifar_vgg", {"depth": 16, "width": 0.125}),
        data=Data("folder", given.cifar, limit=given.limit, crop_padding=4, flip=True),
        penalties=(1e-4,),
        prune_ratios=(0.3, 0.5, 0.7),
        training=Training(epochs=given.epochs),
        stop_rule=StopRule(threshold=0.3, checks_per_epoch=3),
        proof=Proof(budget=0.5, rungs=1),
        retraining=Retraining(epochs=1),
        optuna=Optuna(
            trajectories=given.trajectories,
            ranges={
                "penalty": Range(1e-5, 1e-2, log=True),
                "training.learning_rate": Range(0.005, 0.2, log=True),
                "training.weight_decay": Range(1e-5, 1e-2, log=True),
                "network.options.width": Range(0.08, 0.16),
            },
            sampler=sampler,
            startup=given.startup,
            seed=seed,
        ),
        seeds=(seed,),
    )


def sweep(given: argparse.Namespace, task: tuple[Sampler, int]) -> dict:
    """One sweep: the hypervolume of its tickets so far, after each trajectory."""
    torch.set_num_threads(1)
    sampler, seed = task
    searched, started = space(given, sampler, seed), time.monotonic()
    dataset = load_data(searched.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = prepare(searched, dataset, folder)
        storage = study.open_storage(searched, folder)
        opened = study.open_study(
            searched, storage, study.study_name(searched, dataset.fingerprint)
        )
        accuracies, shares, curve, ends = [], [], [], []
        for _ in range(given.trajectories):
            trial = opened.ask()
            point = study.propose(searched, trial)
            events = [event for some in run_trajectory(setting, point) for event in some]
            values = study.outcome(searched, setting.dense_macs, events)
            opened.tell(trial, values, TrialState.COMPLETE if values else TrialState.FAIL)
            for ticket in select(events, "ticket"):
                accuracies.append(ticket["proof_accuracy"])
                shares.append(ticket["macs"] / setting.dense_macs)
            curve.append(hypervolume(accuracies, shares))
            ends.append(events[-1]["state"])
    return {
        "sampler": sampler,
        "seed": seed,
        "hypervolume": curve,
        "tickets": len(accuracies),
        "states": {state: ends.count(state) for state in sorted(set(ends))},
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", required=True, help="an ImageFolder")
    parser.add_argument("--limit", type=int, default=2000, help="training images")
    parser.add_argument("--epochs", type=int, default=6, help="of a trajectory at most")
    parser.add_argument("--trajectories", type=int, default=16, help="of each sweep")
    parser.add_argument("--startup", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file for every sweep's figures")
    given = parser.parse_args()
    print(machine())
    tasks = [(sampler, seed) for seed in range(given.seeds) for sampler in SAMPLERS]
    spawn = multiprocessing.get_context("spawn")
    done = []
    with ProcessPoolExecutor(given.processes, mp_context=spawn) as pool:
        for result in pool.map(partial(sweep, given), tasks):
            done.append(result)
            print(json.dumps(result), flush=True)
    if given.json:
        given.json.write_text(json.dumps(done, indent=1), encoding="utf-8")
    report(done)


def report(done: list[dict]) -> None:
    last = {(one["sampler"], one["seed"]): one["hypervolume"][-1] for one in done}
    seeds = sorted({one["seed"] for one in done})
    print("\n| seed | TPE | random | difference |\n|---|---|---|---|")
    differences = []
    for seed in seeds:
        tpe, random = (last[sampler, seed] for sampler in SAMPLERS)
        differences.append(tpe - random)
        print(f"| {seed} | {tpe:.4f} | {random:.4f} | {tpe - random:+.4f} |")
    means = [statistics.mean(last[sampler, seed] for seed in seeds) for sampler in SAMPLERS]
    mean = statistics.mean(differences)
    print(f"| mean | {means[0]:.4f} | {means[1]:.4f} | {mean:+.4f} |")
    if len(seeds) > 1:
        error = statistics.stdev(differences) / len(seeds) ** 0.5
        half = student.ppf(0.975, len(seeds) - 1) * error
        print(f"\n95 % interval of the difference: {mean - half:+.4f} to {mean + half:+.4f}")


if __name__ == "__main__":
    main()
