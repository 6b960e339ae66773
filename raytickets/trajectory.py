"""One trajectory: dense training under a penalty that draws a ticket for every prune ratio."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from raytickets.earlybird import MaskWindow, Verdict
from raytickets.journal import Event
from raytickets.masks import cut, widen
from raytickets.models import build_network
from raytickets.shrink import ChannelGroup, channel_groups, gammas, scorer, shrink
from raytickets.ticket import group_masks, kept_channels, load_ticket, package_versions, save_ticket
from raytickets.train import SGD, Numerics, accuracy, cosine, fit, numerics, seeded, train


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


def prepare(
    space: SearchSpace, dataset: DataSet, sweep: Path, device: torch.device | str = "cpu"
) -> Setting:
    """Do once what each trajectory of the sweep in this folder would do again."""
    network, example = dense_network(space, dataset, 0), dataset.shape.example()
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
    network, example = dense_network(space, setting.dataset, 0), setting.dataset.shape.example()
    groups, macs = channel_groups(network, example), cost.macs(network, example)
    return dataclasses.replace(setting, space=space, groups=groups, dense_macs=macs)


def dense_network(space: SearchSpace, dataset: DataSet, seed: int) -> nn.Module:
    """The space's network with the weights of a seed, on the CPU."""
    shape = dataset.shape
    return build_network(
        space.network, in_channels=shape.channels, num_classes=len(shape.classes), seed=seed
    )


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
    changes: Mapping[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)


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


def run_trajectory(setting: Setting, point: Point) -> Iterator[list[Event]]:
    """Train until every prune ratio has drawn, the loss diverges, or the budget ends.

    Yields after every check the events it made (see `raytickets.journal`): the check itself and
    the tickets drawn at it, which are then on disk under `tickets` in the sweep's folder, and in
    the last list how the trajectory ended.
    """
    setting = at_point(setting, point)
    space = setting.space
    trajectory = Trajectory(
        setting=setting,
        id=point.id,
        method="early_bird",
        penalty=point.penalty,
        seed=point.seed,
        recipe=space.training,
        prune_ratios=space.prune_ratios,
        changes=point.changes,
    )
    network = setting.numerics.place(dense_network(space, setting.dataset, point.seed))

    def draw(check: Check, ratios: Sequence[float]) -> Iterator[Event]:
        for ratio in ratios:
            mask, chosen = cut_groups(setting, check.scores, ratio)
            shrunk = shrink(network, setting.groups, mask)
            event = write_ticket(trajectory, "early_bird", ratio, shrunk, mask, chosen, check)
            right, macs = _fine_tune(setting, shrunk, event["macs"], point.seed, rung=1)
            yield event | {"proof_accuracy": right, "proof_macs": macs}

    yield from until_drawn(trajectory, network, converged, draw)


def converged(check: Check, ratio: float) -> bool:
    return check.verdicts[ratio].converged


def until_drawn(
    trajectory: Trajectory,
    network: nn.Module,
    due: Callable[[Check, float], bool],
    draw: Callable[[Check, Sequence[float]], Iterable[Event]],
) -> Iterator[list[Event]]:
    """Train until every prune ratio was due once, and draw it then.

    Yields after every check its event and those of `draw`, and in the last list how it ended.
    """
    window, epochs = mask_window(trajectory), []
    states = dict.fromkeys(trajectory.prune_ratios, "not converged")
    for check in checks(trajectory, network, window):
        epochs.append(check.epoch)
        state, reason, events = "not converged", "", []
        if check.verdicts:
            events.append(_check_event(trajectory, check, states))
            waiting = [ratio for ratio in trajectory.prune_ratios if states[ratio] != "drawn"]
            drawn = [ratio for ratio in waiting if due(check, ratio)]
            states |= dict.fromkeys(drawn, "drawn")
            events += draw(check, drawn)
            if set(states.values()) == {"drawn"}:
                state = "drawn"
        else:
            state, reason = "diverged", diverged(check)
            states = {ratio: "drawn" if s == "drawn" else state for ratio, s in states.items()}
        ended = state != "not converged" or check.last
        if ended:
            end = ending(trajectory, state, states, check.epoch, spent(trajectory, check), reason)
            numbers, matrices = window.matrix()
            end["distances_matrix"] = {
                "epochs": [epochs[number - 1] for number in numbers],
                "ratios": {f"{ratio:g}": rows for ratio, rows in matrices.items()},
            }
            events.append(end)
        yield events
        if ended:
            return


def mask_window(trajectory: Trajectory) -> MaskWindow:
    widths = [group.width for group in trajectory.setting.groups]
    return MaskWindow(trajectory.setting.space.stop_rule, trajectory.prune_ratios, widths)


def checks(trajectory: Trajectory, network: nn.Module, window: MaskWindow) -> Iterator[Check]:
    """Train the network by the trajectory's recipe, to the end or until it diverges."""
    setting, recipe = trajectory.setting, trajectory.recipe
    assert recipe is not None
    rule, batches, how = setting.space.stop_rule, setting.batches, setting.numerics
    score = scorer(network, setting.groups)
    losses = fit(
        network,
        SGD(network, recipe.momentum, recipe.weight_decay),
        batches,
        recipe,
        lambda epoch: seeded("trajectory", trajectory.seed, epoch),
        how,
        penalty=trajectory.penalty,
        checks_per_epoch=rule.checks_per_epoch,
    )
    for number, (steps, loss) in enumerate(losses, start=1):
        epoch = steps / batches.count(recipe.batch_size)
        scores, verdicts, validation = score(), {}, None
        finite = math.isfinite(loss) and bool(scores.isfinite().all())
        if finite:
            # The published rule looks at every BatchNorm's channels, the masks at their groups.
            seen = gammas(network).cpu() if rule.rule == "paper" else scores
            verdicts = dict(zip(trajectory.prune_ratios, window.check(seen), strict=True))
            if epoch.is_integer():
                validation = accuracy(network, batches, "validation", how)
        yield Check(
            number=number,
            epoch=epoch,
            loss=loss,
            samples=steps * recipe.batch_size,
            validation_accuracy=validation,
            scores=scores,
            verdicts=verdicts,
            last=not finite or epoch == recipe.epochs,
        )
        if not finite:
            return


def diverged(check: Check) -> str:
    """Why a check has no verdicts."""
    return f"the loss was {check.loss} in epoch {math.ceil(check.epoch)}"


def spent(trajectory: Trajectory, check: Check) -> int:
    """Training MACs up to a check."""
    return cost.training_macs(trajectory.setting.dense_macs, check.samples)


def _check_event(trajectory: Trajectory, check: Check, states: Mapping[float, str]) -> Event:
    limit = trajectory.setting.space.stop_rule.limit
    return {
        "event": "check",
        "trajectory": trajectory.id,
        "check": check.number,
        "epoch": check.epoch,
        "loss": check.loss,
        "validation_accuracy": check.validation_accuracy,
        "distances": {f"{r:g}": verdict.distance for r, verdict in check.verdicts.items()},
        "about_to_draw": any(
            verdict.distance is not None and verdict.distance <= 2 * limit
            for ratio, verdict in check.verdicts.items()
            if states[ratio] != "drawn"
        ),
        "train_macs": spent(trajectory, check),
        "seconds": time.monotonic() - trajectory.started,
    }


def ending(
    trajectory: Trajectory,
    state: str,
    states: Mapping[float, str],
    epochs: float,
    train_macs: int,
    reason: str = "",
) -> Event:
    """The event of a trajectory's end."""
    return {
        "event": "trajectory",
        "trajectory": trajectory.id,
        "method": trajectory.method,
        "penalty": trajectory.penalty,
        "seed": trajectory.seed,
        "changes": dict(trajectory.changes),
        "state": state,
        "reason": reason,
        "epochs": epochs,
        "train_macs": train_macs,
        "seconds": time.monotonic() - trajectory.started,
        "ratios": {f"{ratio:g}": state for ratio, state in states.items()},
        "distances_matrix": {"epochs": [], "ratios": {}},
    }


def cut_groups(setting: Setting, scores: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """The mask of a ticket, and what the cut chose before the space's floor and rounding.

    scores is float [channels over all groups]; both are bool of that shape.
    """
    space, widths = setting.space, [group.width for group in setting.groups]
    chosen = cut(scores, ratio)
    mask = widen(chosen, scores, widths, least=space.min_channels, multiple=space.round_to)
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
    network = copy.deepcopy(shrunk).cpu().float()
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
