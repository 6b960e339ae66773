"""One trajectory: dense training under a penalty that draws a ticket for every prune ratio."""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from raytickets import cost
from raytickets.config import SearchSpace
from raytickets.data import Batches, DataSet
from raytickets.earlybird import MaskWindow, Verdict
from raytickets.journal import Event
from raytickets.masks import cut, keep_floor
from raytickets.models import build_network
from raytickets.shrink import ChannelGroup, channel_groups, gammas, scorer, shrink
from raytickets.ticket import group_masks, kept_channels, package_versions, save_ticket
from raytickets.train import SGD, accuracy, seeded, train_epoch


@dataclass(frozen=True)
class Point:
    """Where in the sweep's grid a trajectory stands."""

    penalty: float
    seed: int

    @property
    def id(self) -> str:
        return f"penalty{self.penalty:g}-seed{self.seed}"


def grid(space: SearchSpace) -> list[Point]:
    """Every trajectory of a sweep."""
    return [Point(penalty, seed) for seed in space.seeds for penalty in space.penalties]


def run_trajectory(
    space: SearchSpace,
    point: Point,
    dataset: DataSet,
    sweep: Path,
    device: torch.device | str = "cpu",
) -> Iterator[list[Event]]:
    """Train until every prune ratio has drawn, the loss diverges, or the budget ends.

    Yields after every check the events it made (see `raytickets.journal`): the check itself and
    the tickets drawn at it, which are then on disk under `sweep/tickets`, and in the last list how
    the trajectory ended.
    """
    recipe, started = space.training, time.monotonic()
    example = dataset.shape.example()
    network = build_network(
        space.network,
        in_channels=dataset.shape.channels,
        num_classes=len(dataset.shape.classes),
        seed=point.seed,
    )
    groups = channel_groups(network, example)
    forward_macs = cost.macs(network, example)
    network.to(device)
    batches = Batches(dataset, space.data, device)
    optimizer = SGD(network, recipe.momentum, recipe.weight_decay)
    score = scorer(network, groups)
    window = MaskWindow(space.stop_rule, space.prune_ratios)
    batch_count = batches.count(recipe.batch_size)
    states = dict.fromkeys(space.prune_ratios, "not converged")
    state, reason, epoch = "not converged", "", 0

    while state == "not converged" and epoch < recipe.epochs:
        loss = train_epoch(
            network,
            optimizer,
            recipe,
            epoch,
            batches.training(recipe.batch_size, seeded("trajectory", point.seed, epoch)),
            batch_count,
            point.penalty,
        )
        epoch += 1
        spent = cost.training_macs(forward_macs, epoch * batch_count * recipe.batch_size)
        channel_scores = score()
        events: list[Event] = []
        if math.isfinite(loss) and channel_scores.isfinite().all():
            # The published rule looks at every BatchNorm's channels, the masks at their groups.
            paper = space.stop_rule.rule == "paper"
            verdicts = window.check(gammas(network).cpu() if paper else channel_scores)
            events.append(
                {
                    "event": "check",
                    "trajectory": point.id,
                    "check": epoch,
                    "epoch": epoch,
                    "loss": loss,
                    "validation_accuracy": accuracy(network, batches, "validation"),
                    "distances": {
                        f"{ratio:g}": verdict.distance
                        for ratio, verdict in zip(space.prune_ratios, verdicts, strict=True)
                    },
                    "train_macs": spent,
                    "seconds": time.monotonic() - started,
                }
            )
            for ratio, verdict in zip(space.prune_ratios, verdicts, strict=True):
                if verdict.converged and states[ratio] != "drawn":
                    states[ratio] = "drawn"
                    draw = _Draw(space, point, ratio, epoch, verdict)
                    events.append(_draw(draw, network, groups, channel_scores, batches, sweep))
            if set(states.values()) == {"drawn"}:
                state = "drawn"
        else:
            state, reason = "diverged", f"the loss was {loss} in epoch {epoch}"
            states = {ratio: "drawn" if s == "drawn" else state for ratio, s in states.items()}
        if state != "not converged" or epoch == recipe.epochs:
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


@dataclass(frozen=True)
class _Draw:
    space: SearchSpace
    point: Point
    ratio: float
    epoch: int
    verdict: Verdict


def _draw(
    draw: _Draw,
    network: nn.Module,
    groups: tuple[ChannelGroup, ...],
    channel_scores: Tensor,
    batches: Batches,
    sweep: Path,
) -> Event:
    """Write the ticket, then prove it; the event that tells of both."""
    space, dataset, epoch = draw.space, batches.dataset, draw.epoch
    widths = [group.width for group in groups]
    free = cut(channel_scores, [draw.ratio])[0]
    mask = keep_floor(free, channel_scores, widths, space.min_channels)
    raised = (free != mask).split(widths)
    example = dataset.shape.example().to(batches.device)
    shrunk = shrink(network, groups, mask)
    macs, params = cost.macs(shrunk, example), cost.params(shrunk)
    ticket = save_ticket(
        sweep / "tickets",
        copy.deepcopy(shrunk).cpu(),
        {
            "network": {
                "name": space.network.name,
                "options": dict(space.network.options),
                "in_channels": dataset.shape.channels,
                "num_classes": len(dataset.shape.classes),
                "image_size": dataset.shape.size,
            },
            "groups": group_masks(groups, mask),
            "min_channels": {
                "least": space.min_channels,
                "acted_on": [g.name for g, part in zip(groups, raised, strict=True) if part.any()],
            },
            "penalty": draw.point.penalty,
            "prune_ratio": draw.ratio,
            "learning_rate": space.training.learning_rate,
            "seed": draw.point.seed,
            "threads": torch.get_num_threads(),
            "stop_rule": {
                "rule": space.stop_rule.rule,
                "window": space.stop_rule.window,
                "threshold": space.stop_rule.limit,
                "distances": list(draw.verdict.distances),
            },
            "draw": {"check": epoch, "epoch": epoch},
            "space": {"name": space.name, "fingerprint": space.fingerprint},
            "data": {"fingerprint": dataset.fingerprint},
            "macs": macs,
            "params": params,
            "versions": package_versions(),
        },
    )
    proof_accuracy, samples = _prove(draw, shrunk, batches)
    return {
        "event": "ticket",
        "trajectory": draw.point.id,
        "ticket": ticket.id,
        "path": str(ticket.path.relative_to(sweep)),
        "penalty": draw.point.penalty,
        "prune_ratio": draw.ratio,
        "learning_rate": space.training.learning_rate,
        "seed": draw.point.seed,
        "rule": space.stop_rule.rule,
        "draw_check": epoch,
        "draw_epoch": epoch,
        "mask_distance": draw.verdict.distance,
        "macs": macs,
        "params": params,
        "kept": kept_channels(ticket.manifest),
        "proof_accuracy": proof_accuracy,
        "proof_macs": cost.training_macs(macs, samples),
    }


def _prove(draw: _Draw, shrunk: nn.Module, batches: Batches) -> tuple[float, int]:
    """Fine-tune the shrunk ticket in place: validation accuracy, and the samples it took."""
    recipe = draw.space.proof
    optimizer = SGD(shrunk, recipe.momentum, recipe.weight_decay)
    batch_count = batches.count(recipe.batch_size)
    for epoch in range(recipe.epochs):
        order = seeded("proof", draw.point.seed, epoch)
        training = batches.training(recipe.batch_size, order)
        train_epoch(shrunk, optimizer, recipe, epoch, training, batch_count)
    samples = recipe.epochs * batch_count * recipe.batch_size
    return accuracy(shrunk, batches, "validation"), samples
