"""Drawing a ticket: its channels cut, its files written, its worth proved by fine-tuning."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raytickets import cost
from raytickets.batches import Batches
from raytickets.config import SearchSpace, Training
from raytickets.data import DataSet
from raytickets.earlybird import Verdict
from raytickets.energy import Meter
from raytickets.journal import Event
from raytickets.masks import cut, widen
from raytickets.shrink import ChannelGroup, spread
from raytickets.ticket import group_masks, kept_channels, load_ticket, package_versions, save_ticket
from raytickets.train import SGD, Numerics, accuracy, cosine, seed_of, seeded, train


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

    def meter(self) -> Meter:
        return Meter(self.numerics.device, self.space.resources.watts)


@dataclass(frozen=True)
class Trajectory:
    """What tickets are searched with: for a sweep, or for a method of a comparison."""

    setting: Setting
    id: str
    method: str
    penalty: float
    seed: int
    recipe: Training | None
    """None where nothing is trained before retraining."""
    prune_ratios: tuple[float, ...]
    meter: Meter
    """Of all its work so far."""
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One look at a network in training."""

    number: int
    epoch: float
    loss: float
    samples: int
    """Trained on so far."""
    validation_accuracy: float | None
    """None within an epoch."""
    scores: Tensor
    verdicts: Mapping[float, Verdict]
    """By prune ratio; none once the loss or a score is not finite."""
    last: bool


def cut_groups(setting: Setting, scores: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """The mask of a ticket, and what the cut chose before the space's floor and rounding.

    scores is float [channels over all groups]; both are bool of that shape.
    """
    space, widths = setting.space, [group.width for group in setting.groups]
    chosen = cut(scores, ratio)
    mask = spread(setting.groups, chosen, scores)
    mask = widen(mask, scores, widths, least=space.min_channels, multiple=space.round_to)
    return mask, chosen


def write_ticket(
    trajectory: Trajectory,
    method: str,
    ratio: float,
    shrunk: nn.Module,
    mask: Tensor,
    chosen: Tensor,
    check: Check | None = None,
) -> Event:
    """Write the shrunk network of a mask as a ticket; its event, but for what it cost.

    `check` is the one it was drawn at, if it was. The network is left as it is.
    """
    setting, space, recipe = trajectory.setting, trajectory.setting.space, trajectory.recipe
    shape, groups = setting.dataset.shape, setting.groups
    parts = chosen.split([group.width for group in groups])
    verdict = check and check.verdicts[ratio]
    # Copying thousands of small tensors takes as long as writing them.
    plain = all(w.device.type == "cpu" and w.dtype == torch.float32 for w in shrunk.parameters())
    network = shrunk if plain else copy.deepcopy(shrunk).cpu().float()
    found = {
        "penalty": trajectory.penalty,
        "prune_ratio": ratio,
        "learning_rate": recipe and recipe.learning_rate,
        "seed": trajectory.seed,
        "macs": cost.macs(network, shape.example()),
        "params": cost.params(network),
    }
    ticket = save_ticket(
        setting.sweep / "tickets",
        network,
        {
            "method": method,
            "network": {
                "name": space.network.name,
                "options": dict(space.network.options),
                "in_channels": shape.channels,
                "num_classes": len(shape.classes),
                "image_size": shape.size,
            },
            "groups": group_masks(groups, mask, chosen),
            "min_channels": {
                "least": space.min_channels,
                "acted_on": [
                    group.name
                    for group, part in zip(groups, parts, strict=True)
                    if part.sum() < min(space.min_channels, group.width)
                ],
            },
            "round_to": space.round_to,
            "threads": torch.get_num_threads(),
            "precision": str(setting.numerics.dtype).removeprefix("torch."),
            "stop_rule": verdict
            and {
                "rule": space.stop_rule.rule,
                "window": space.stop_rule.window,
                "threshold": space.stop_rule.limit,
                "checks_per_epoch": space.stop_rule.checks_per_epoch,
                "distances": list(verdict.distances),
            },
            "draw": check and {"check": check.number, "epoch": check.epoch},
            "space": {"name": space.name, "fingerprint": space.fingerprint},
            "data": {"fingerprint": setting.dataset.fingerprint},
            "versions": package_versions(),
            **found,
        },
    )
    return {
        "event": "ticket",
        "trajectory": trajectory.id,
        "ticket": ticket.id,
        "path": str(ticket.path.relative_to(setting.sweep)),
        "method": method,
        "rule": verdict and space.stop_rule.rule,
        "draw_check": check and check.number,
        "draw_epoch": check and check.epoch,
        "mask_distance": verdict and verdict.distance,
        "kept": kept_channels(ticket.manifest),
        **found,
    }


def prove(setting: Setting, path: Path, rung: int) -> Event:
    """Fine-tune a ticket on disk once more from its draw, with the MACs of this rung (from 2)."""
    started = time.monotonic()
    ticket = load_ticket(path, trust_code=True)
    macs, seed = ticket.manifest["macs"], ticket.manifest["seed"]
    proof_accuracy, proof_macs = fine_tune(setting, ticket.network(), macs, seed, rung)
    return {
        "event": "proof",
        "ticket": ticket.id,
        "rung": rung,
        "proof_accuracy": proof_accuracy,
        "proof_macs": proof_macs,
        "seconds": time.monotonic() - started,
    }


def fine_tune(
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
    torch.manual_seed(seed_of("proof dropout", seed))
    train(network, optimizer, islice(endless, steps), rates, setting.numerics)
    spent = cost.training_macs(macs, steps * recipe.batch_size)
    return accuracy(network, batches, "validation", setting.numerics), spent
