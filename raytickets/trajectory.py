"""One trajectory: dense training under a penalty that draws a ticket for every prune ratio."""

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raytickets import cost
from raytickets.batches import Batches
from raytickets.config import SearchSpace
from raytickets.data import DataSet
from raytickets.earlybird import MaskWindow, Verdict
from raytickets.journal import Event
from raytickets.masks import cut, widen
from raytickets.models import build_network
from raytickets.shrink import ChannelGroup, channel_groups, gammas, scorer, shrink
from raytickets.ticket import group_masks, kept_channels, load_ticket, package_versions, save_ticket
from raytickets.train import SGD, Numerics, accuracy, cosine, learning_rate, numerics, seeded, train


@dataclass(frozen=True)
class Point:
    """What a trajectory differs in from the others of its sweep."""

    penalty: float
    seed: int
    number: int | None = None
    """Of Optuna's trial; None for a point of the grid."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Other values for fields of the space, as `SearchSpace.with_changes` takes them."""

    @property
    def id(self) -> str:
        place = f"penalty{self.penalty:g}" if self.number is None else f"trial{self.number}"
        return f"{place}-seed{self.seed}"


def grid(space: SearchSpace) -> list[Point]:
    """Every trajectory of a sweep."""
    return [Point(penalty, seed) for seed in space.seeds for penalty in space.penalties]


@dataclass(frozen=True)
class Setting:
    """What all trajectories of a sweep have in common on one worker; none of them changes it."""

    space: SearchSpace
    sweep: Path
    batches: Batches
    groups: tuple[ChannelGroup, ...]
    numerics: Numerics
    dense_macs: int
    proof_macs: int
    """Training MACs of one epoch of the space's own network: what proofs count their budget in,
    whatever network a point trains."""

    @property
    def dataset(self) -> DataSet:
        return self.batches.dataset

    @property
    def batch_count(self) -> int:
        """Batches in an epoch of a trajectory."""
        return self.batches.count(self.space.training.batch_size)


def prepare(
    space: SearchSpace, dataset: DataSet, sweep: Path, device: torch.device | str = "cpu"
) -> Setting:
    """Do once what each trajectory of the sweep in this folder would do again."""
    network, example = _dense_network(space, dataset, 0), dataset.shape.example()
    dense_macs = cost.macs(network, example)
    return Setting(
        space=space,
        sweep=sweep,
        batches=Batches(dataset, space.data, device),
        groups=channel_groups(network, example),
        numerics=numerics(space.precision, space.channels_last, network, device),
        dense_macs=dense_macs,
        proof_macs=cost.training_macs(dense_macs, len(dataset.train)),
    )


def at_point(setting: Setting, point: Point) -> Setting:
    """The setting with what the point changes."""
    if not point.changes:
        return setting
    space = setting.space.with_changes(point.changes)
    if space.network == setting.space.network:
        return dataclasses.replace(setting, space=space)
    network, example = _dense_network(space, setting.dataset, 0), setting.dataset.shape.example()
    groups, macs = channel_groups(network, example), cost.macs(network, example)
    return dataclasses.replace(setting, space=space, groups=groups, dense_macs=macs)


def _dense_network(space: SearchSpace, dataset: DataSet, seed: int) -> nn.Module:
    shape = dataset.shape
    return build_network(
        space.network, in_channels=shape.channels, num_classes=len(shape.classes), seed=seed
    )


def run_trajectory(setting: Setting, point: Point) -> Iterator[list[Event]]:
    """Train until every prune ratio has drawn, the loss diverges, or the budget ends.

    Yields after every check the events it made (see `raytickets.journal`): the check itself and
    the tickets drawn at it, which are then on disk under `tickets` in the sweep's folder, and in
    the last list how the trajectory ended.
    """
    setting = at_point(setting, point)
    space, started = setting.space, time.monotonic()
    network = setting.numerics.place(_dense_network(space, setting.dataset, point.seed))
    score = scorer(network, setting.groups)
    window = MaskWindow(space.stop_rule, space.prune_ratios)
    states = dict.fromkeys(space.prune_ratios, "not converged")
    state, reason = "not converged", ""

    for check, (steps, loss) in enumerate(_train(setting, point, network), start=1):
        epoch = steps / setting.batch_count
        spent = cost.training_macs(setting.dense_macs, steps * space.training.batch_size)
        channel_scores = score()
        events: list[Event] = []
        if math.isfinite(loss) and channel_scores.isfinite().all():
            # The published rule looks at every BatchNorm's channels, the masks at their groups.
            paper = space.stop_rule.rule == "paper"
            verdicts = window.check(gammas(network).cpu() if paper else channel_scores)
            found = dict(zip(space.prune_ratios, verdicts, strict=True))
            validation = None
            if epoch.is_integer():
                validation = accuracy(network, setting.batches, "validation", setting.numerics)
            events.append(
                {
                    "event": "check",
                    "trajectory": point.id,
                    "check": check,
                    "epoch": epoch,
                    "loss": loss,
                    "validation_accuracy": validation,
                    "distances": {f"{r:g}": verdict.distance for r, verdict in found.items()},
                    "about_to_draw": any(
                        max(found[ratio].distances, default=math.inf) <= 2 * space.stop_rule.limit
                        for ratio, state in states.items()
                        if state != "drawn"
                    ),
                    "train_macs": spent,
                    "seconds": time.monotonic() - started,
                }
            )
            for ratio, verdict in found.items():
                if verdict.converged and states[ratio] != "drawn":
                    states[ratio] = "drawn"
                    draw = _Draw(setting, point, ratio, check, epoch, verdict)
                    events.append(_draw(draw, network, channel_scores))
            if set(states.values()) == {"drawn"}:
                state = "drawn"
        else:
            state, reason = "diverged", f"the loss was {loss} in epoch {math.ceil(epoch)}"
            states = {ratio: "drawn" if s == "drawn" else state for ratio, s in states.items()}
        ended = state != "not converged" or epoch == space.training.epochs
        if ended:
            events.append(
                {
                    "event": "trajectory",
                    "trajectory": point.id,
                    "penalty": point.penalty,
                    "seed": point.seed,
                    "state": state,
                    "reason": reason,
                    "epochs": epoch,
                    "train_macs": spent,
                    "seconds": time.monotonic() - started,
                    "ratios": {f"{ratio:g}": s for ratio, s in states.items()},
                }
            )
        yield events
        if ended:
            return


def _train(setting: Setting, point: Point, network: nn.Module) -> Iterator[tuple[int, float]]:
    """Train the budget: at every check the steps done so far, and the mean loss since the last."""
    recipe, batch_count = setting.space.training, setting.batch_count
    optimizer = SGD(network, recipe.momentum, recipe.weight_decay)
    checks = setting.space.stop_rule.checks_per_epoch
    bounds = [batch_count * check // checks for check in range(checks + 1)]
    for epoch in range(recipe.epochs):
        order = seeded("trajectory", point.seed, epoch)
        batches = setting.batches.training(recipe.batch_size, order)
        rates = [learning_rate(recipe, epoch + step / batch_count) for step in range(batch_count)]
        for start, end in pairwise(bounds):
            some = islice(batches, end - start)
            penalty, how = point.penalty, setting.numerics
            loss = train(network, optimizer, some, rates[start:end], how, penalty)
            yield epoch * batch_count + end, loss


@dataclass(frozen=True)
class _Draw:
    setting: Setting
    point: Point
    ratio: float
    check: int
    epoch: float
    verdict: Verdict


def _draw(draw: _Draw, network: nn.Module, channel_scores: Tensor) -> Event:
    """Write the ticket, then prove it; the event that tells of both."""
    setting, space = draw.setting, draw.setting.space
    dataset, groups = setting.dataset, setting.groups
    widths = [group.width for group in groups]
    chosen = cut(channel_scores, draw.ratio)
    mask = widen(chosen, channel_scores, widths, least=space.min_channels, multiple=space.round_to)
    floored = [
        group.name
        for group, part in zip(groups, chosen.split(widths), strict=True)
        if part.sum() < min(space.min_channels, group.width)
    ]
    shrunk = shrink(network, groups, mask)
    macs = cost.macs(shrunk, dataset.shape.example().to(setting.numerics.device))
    params = cost.params(shrunk)
    ticket = save_ticket(
        setting.sweep / "tickets",
        copy.deepcopy(shrunk).cpu(),
        {
            "network": {
                "name": space.network.name,
                "options": dict(space.network.options),
                "in_channels": dataset.shape.channels,
                "num_classes": len(dataset.shape.classes),
                "image_size": dataset.shape.size,
            },
            "groups": group_masks(groups, mask, chosen),
            "min_channels": {"least": space.min_channels, "acted_on": floored},
            "round_to": space.round_to,
            "penalty": draw.point.penalty,
            "prune_ratio": draw.ratio,
            "learning_rate": space.training.learning_rate,
            "seed": draw.point.seed,
            "threads": torch.get_num_threads(),
            "precision": str(setting.numerics.dtype).removeprefix("torch."),
            "stop_rule": {
                "rule": space.stop_rule.rule,
                "window": space.stop_rule.window,
                "threshold": space.stop_rule.limit,
                "checks_per_epoch": space.stop_rule.checks_per_epoch,
                "distances": list(draw.verdict.distances),
            },
            "draw": {"check": draw.check, "epoch": draw.epoch},
            "space": {"name": space.name, "fingerprint": space.fingerprint},
            "data": {"fingerprint": dataset.fingerprint},
            "macs": macs,
            "params": params,
            "versions": package_versions(),
        },
    )
    proof_accuracy, proof_macs = _fine_tune(setting, shrunk, macs, draw.point.seed, rung=1)
    return {
        "event": "ticket",
        "trajectory": draw.point.id,
        "ticket": ticket.id,
        "path": str(ticket.path.relative_to(setting.sweep)),
        "penalty": draw.point.penalty,
        "prune_ratio": draw.ratio,
        "learning_rate": space.training.learning_rate,
        "seed": draw.point.seed,
        "rule": space.stop_rule.rule,
        "draw_check": draw.check,
        "draw_epoch": draw.epoch,
        "mask_distance": draw.verdict.distance,
        "macs": macs,
        "params": params,
        "kept": kept_channels(ticket.manifest),
        "proof_accuracy": proof_accuracy,
        "proof_macs": proof_macs,
    }


def prove(setting: Setting, path: Path, rung: int) -> Event:
    """Fine-tune a ticket on disk once more from its draw, with the MACs of this rung (from 2)."""
    started = time.monotonic()
    ticket = load_ticket(path, trust_code=True)
    macs, seed = ticket.manifest["macs"], ticket.manifest["seed"]
    proof_accuracy, proof_macs = _fine_tune(setting, ticket.network(), macs, seed, rung)
    return {
        "event": "proof",
        "ticket": ticket.id,
        "rung": rung,
        "proof_accuracy": proof_accuracy,
        "proof_macs": proof_macs,
        "seconds": time.monotonic() - started,
    }


def _fine_tune(
    setting: Setting, network: nn.Module, macs: int, seed: int, rung: int
) -> tuple[float, int]:
    """Fine-tune a shrunk network in place: its validation accuracy, and the training MACs spent."""
    recipe, batches = setting.space.proof, setting.batches
    budget = recipe.budget * 2 ** (rung - 1) * setting.proof_macs
    steps = max(1, int(budget / cost.training_macs(macs, recipe.batch_size)))
    orders = (seeded("proof", seed, epoch) for epoch in count())
    endless = (batch for order in orders for batch in batches.training(recipe.batch_size, order))
    rates = [recipe.learning_rate * cosine(step / steps) for step in range(steps)]
    optimizer = SGD(setting.numerics.place(network), recipe.momentum, recipe.weight_decay)
    train(network, optimizer, islice(endless, steps), rates, setting.numerics)
    spent = cost.training_macs(macs, steps * recipe.batch_size)
    return accuracy(network, batches, "validation", setting.numerics), spent
