"""The stop rules side by side, on the same recorded trainings.

    uv run python tests/benchmarks/stop_rules.py                   # scikit-learn's digits
    uv run python tests/benchmarks/stop_rules.py --cifar FOLDER    # CIFAR-10, VGG16 at 1/8 width

For each seed one network is trained under the penalty for the whole budget, and its scores and
weights are kept at every check. Each rule then looks at the same scores, for all ratios; the ticket
of its draw is shrunk and retrained, and so is one cut at the end of the budget, whatever the rules
say. Seeds go to processes of one thread each, without Ray. Noise is a score vector drawn anew at
each check: from how many streams of 40 checks a rule ever draws, with the channel groups of the
trained network and with those of VGG16.
"""

import argparse
import copy
import dataclasses
import multiprocessing
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import get_args

import torch
from timing import machine
from torch import Tensor, nn

from raytickets.config import Data, Network, Retraining, Rule, SearchSpace, Training
from raytickets.data import load_data
from raytickets.draw import Setting, cut_groups
from raytickets.earlybird import MaskWindow
from raytickets.methods import penalty
from raytickets.shrink import gammas, scorer, shrink
from raytickets.spaces import load_space
from raytickets.train import SGD, accuracy, check_steps, fit, seeded
from raytickets.trajectory import dense_network, prepare

RULES: tuple[Rule, ...] = get_args(Rule)
END = "end of the budget"
RATIOS = (0.05, 0.3, 0.5, 0.7, 0.9, 0.95)
"""For digits: its network is quickly retrained, and rules differ most at the ends."""
VGG16 = (64, 64, 128, 128, 256, 256, 256, *[512] * 6)
"""Widths of its channel groups."""
CHECKS = 40
"""In a stream of noise."""
HEADER = (
    "| data | ratio | stop rule | drew | at epoch | validation, % | test, % |"
    " test less cut at the end, points | draws from noise | with the groups of VGG16 |\n"
    + "|---" * 10
    + "|"
)


@dataclass(frozen=True)
class Look:
    """A network in training, at one check."""

    epoch: float
    scores: Tensor
    gammas: Tensor
    network: nn.Module


@dataclass(frozen=True)
class Retrained:
    """What became of the ticket of one rule, ratio and seed."""

    epoch: float
    validation: float
    test: float


def cifar(folder: str, images: int) -> SearchSpace:
    return SearchSpace(
        name="cifar10",
        network=Network("cifar_vgg", {"depth": 16, "width": 0.125}),
        data=Data("folder", folder, limit=images, validation=0.1, crop_padding=4, flip=True),
        penalties=(1e-4,),
        prune_ratios=(0.3, 0.5, 0.7),
        training=Training(epochs=20, batch_size=64, learning_rate=0.05),
        retraining=Retraining(epochs=12, batch_size=64, learning_rate=0.05),
    )


def record(setting: Setting, seed: int) -> list[Look]:
    """Train the whole budget and keep what every check sees."""
    space, looks = setting.space, []
    network = setting.numerics.place(dense_network(space, setting.dataset, seed))
    score, recipe = scorer(network, setting.groups), space.training
    done = fit(
        network,
        SGD(network, recipe.momentum, recipe.weight_decay),
        setting.batches,
        recipe,
        ("trajectory", seed),
        setting.numerics,
        penalty=penalty(space),
        checks_per_epoch=space.stop_rule.checks_per_epoch,
    )
    count = setting.batches.count(recipe.batch_size)
    ends = check_steps(count, space.stop_rule.checks_per_epoch)
    for steps, _ in done:
        epoch = steps / count
        if (steps - 1) % count + 1 not in ends:
            continue
        looks.append(Look(epoch, score(), gammas(network).cpu(), copy.deepcopy(network)))
    return looks


def windows(space: SearchSpace, widths: Sequence[int]) -> dict[Rule, MaskWindow]:
    found: dict[Rule, MaskWindow] = {}
    for rule in RULES:
        changed = dataclasses.replace(space.stop_rule, rule=rule, threshold=None)
        found[rule] = MaskWindow(changed, space.prune_ratios, widths)
    return found


def draws(setting: Setting, looks: Sequence[Look]) -> dict[Rule, dict[float, Look]]:
    """By rule the first check at which it holds, for the ratios where it ever does."""
    found: dict[Rule, dict[float, Look]] = {rule: {} for rule in RULES}
    widths = [group.width for group in setting.groups]
    for rule, window in windows(setting.space, widths).items():
        for look in looks:
            verdicts = window.check(look.gammas if rule == "paper" else look.scores)
            for ratio, verdict in zip(setting.space.prune_ratios, verdicts, strict=True):
                if verdict.converged:
                    found[rule].setdefault(ratio, look)
    return found


def retrain(setting: Setting, look: Look, ratio: float, seed: int) -> Retrained:
    recipe, batches = setting.space.retraining, setting.batches
    mask, _ = cut_groups(setting, look.scores, ratio)
    network = shrink(look.network, setting.groups, mask)
    optimizer = SGD(network, recipe.momentum, recipe.weight_decay)
    for _ in fit(network, optimizer, batches, recipe, ("retrain", seed), setting.numerics):
        pass
    exact = setting.numerics.exact
    validation, test = (accuracy(network, batches, s, exact) for s in ("validation", "test"))
    return Retrained(look.epoch, validation, test)


def side_by_side(space: SearchSpace, seed: int) -> dict[tuple[float, str], Retrained]:
    """One seed's tickets by ratio and rule, and those cut at the end."""
    torch.set_num_threads(1)
    setting = prepare(space, load_data(space.data), Path())
    looks = record(setting, seed)
    drawn: dict[str, Mapping[float, Look]] = {**draws(setting, looks)}
    drawn[END] = dict.fromkeys(space.prune_ratios, looks[-1])
    # Rules that draw at the same check share the ticket.
    tickets: dict[tuple[float, float], Retrained] = {}
    found = {}
    for rule, looked in drawn.items():
        for ratio, look in looked.items():
            if (ratio, look.epoch) not in tickets:
                tickets[ratio, look.epoch] = retrain(setting, look, ratio, seed)
            found[ratio, rule] = tickets[ratio, look.epoch]
    return found


def fired_on_noise(
    space: SearchSpace, widths: Sequence[int], streams: int
) -> Counter[tuple[float, str]]:
    """In how many streams each rule draws at each ratio."""
    fired: Counter[tuple[float, str]] = Counter()
    for stream in range(streams):
        noise = torch.rand(CHECKS, sum(widths), generator=seeded("noise", stream))
        for rule, window in windows(space, widths).items():
            verdicts = [[v.converged for v in window.check(scores)] for scores in noise]
            for ratio, ever in zip(space.prune_ratios, torch.tensor(verdicts).any(0), strict=True):
                fired[ratio, rule] += int(ever)
    return fired


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of shares, in per cent."""
    if not values:
        return ""
    deviation = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{deviation}"


def table(
    space: SearchSpace,
    seeds: Sequence[Mapping[tuple[float, str], Retrained]],
    noise: Sequence[Mapping[tuple[float, str], int]],
    streams: int,
) -> None:
    ratios = space.prune_ratios
    for rule in (*RULES, END):
        for some in dict.fromkeys((*((ratio,) for ratio in ratios), ratios)):
            pairs = [
                (found[ratio, rule], found[ratio, END])
                for found in seeds
                for ratio in some
                if (ratio, rule) in found
            ]
            epochs = [ticket.epoch for ticket, _ in pairs]
            when = f"{mean(epochs):.3g} ({min(epochs):g} to {max(epochs):g})" if epochs else "never"
            cells = [
                space.name,
                f"{some[0]:g}" if len(some) == 1 else "all",
                rule if rule == END else f"`{rule}`",
                f"{len(pairs)} of {len(seeds) * len(some)}",
                when,
                spread([ticket.validation for ticket, _ in pairs]),
                spread([ticket.test for ticket, _ in pairs]),
            ]
            if rule != END:
                cells.append(spread([ticket.test - end.test for ticket, end in pairs]))
                fired = [sum(counts[ratio, rule] for ratio in some) for counts in noise]
                cells += [f"{count} of {streams * len(some)}" for count in fired]
            else:
                cells += [""] * (1 + len(noise))
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", help="ImageFolder of CIFAR-10, in place of digits")
    parser.add_argument("--images", type=int, default=4000, help="of CIFAR-10, to train on")
    parser.add_argument("--ratios", type=float, nargs="+", help="in place of the space's own")
    parser.add_argument("--runs", type=int, default=3, help="seeds")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="the budget, in place of the space's own")
    parser.add_argument("--retraining-epochs", type=int, help="in place of the space's own")
    parser.add_argument("--streams", type=int, default=200, help="of noise")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    if parsed.cifar:
        space = cifar(parsed.cifar, parsed.images)
    else:
        space = dataclasses.replace(load_space("digits"), prune_ratios=RATIOS)
    training, retraining = space.training, space.retraining
    space = dataclasses.replace(
        space,
        prune_ratios=tuple(parsed.ratios or space.prune_ratios),
        training=dataclasses.replace(training, epochs=parsed.epochs or training.epochs),
        retraining=dataclasses.replace(
            retraining, epochs=parsed.retraining_epochs or retraining.epochs
        ),
    )
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(parsed.processes, parsed.runs), mp_context=spawn) as pool:
        pending = [pool.submit(side_by_side, space, seed) for seed in range(parsed.runs)]
        seeds = [future.result() for future in pending]
    groups = prepare(space, load_data(space.data), Path()).groups
    networks = [group.width for group in groups], VGG16
    noise = [fired_on_noise(space, widths, parsed.streams) for widths in networks]
    print(HEADER)
    table(space, seeds, noise, parsed.streams)
    recipe = f"budget {space.training.epochs} epochs, retraining {space.retraining.epochs}"
    print(f"\nn = {parsed.runs} seeds, penalty {penalty(space):g}, {recipe}; {machine()}")


if __name__ == "__main__":
    main()
