"""One trajectory: dense training under a penalty that draws a ticket for every prune ratio."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raytickets import checkpoint, cost
from raytickets.batches import Batches
from raytickets.checkpoint import Checkpoint
from raytickets.config import SearchSpace, Training
from raytickets.data import DataSet
from raytickets.draw import Check, Setting, Trajectory, cut_groups, fine_tune, write_ticket
from raytickets.earlybird import MaskWindow
from raytickets.journal import Event
from raytickets.models import build_network
from raytickets.shrink import channel_groups, gammas, scorer, shrink
from raytickets.ticket import is_whole, package_versions
from raytickets.train import SGD, accuracy, check_steps, fit, numerics

CHANGED = "other versions, threads or numerics than before: it began anew"


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


def run_trajectory(setting: Setting, point: Point) -> Iterator[list[Event]]:
    """Train until every prune ratio has drawn, the loss diverges, or the budget ends.

    Yields after every check the events it made (see `raytickets.journal`): the check itself and
    the tickets drawn at it, which are then on disk under `tickets` in the sweep's folder, and in
    the last list how the trajectory ended.

    There is a checkpoint after every epoch, and within one every minute, under `checkpoints` in the
    sweep's folder. Started again, it yields what it has yielded before, and goes on from the newest
    whole one that was made by the same space, data, versions, threads and numerics; on a CPU it is
    then as if it had never stopped, but for what a network keeps outside of parameters and buffers.
    If newer ones were damaged it tells so first. Raises OSError if a checkpoint cannot be written.
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
        meter=setting.meter(),
        changes=point.changes,
    )
    network = setting.numerics.place(dense_network(space, setting.dataset, point.seed))

    def draw(check: Check, ratios: Sequence[float]) -> Iterator[Event]:
        for ratio in ratios:
            mask, chosen = cut_groups(setting, check.scores, ratio)
            shrunk = shrink(network, setting.groups, mask)
            event = write_ticket(trajectory, "early_bird", ratio, shrunk, mask, chosen, check)
            right, macs = fine_tune(setting, shrunk, event["macs"], point.seed, rung=1)
            yield event | {"proof_accuracy": right, "proof_macs": macs}

    yield from until_drawn(trajectory, network, converged, draw)


def converged(check: Check, ratio: float) -> bool:
    return check.verdicts[ratio].converged


def until_drawn(
    trajectory: Trajectory,
    network: nn.Module,
    due: Callable[[Check, float], bool],
    draw: Callable[[Check, Sequence[float]], Iterable[Event]],
    also: nn.Module | None = None,
) -> Iterator[list[Event]]:
    """Train until every prune ratio was due once, and draw it then.

    Yields after every check its event and those of `draw`, and in the last list how it ended. It
    makes checkpoints, and goes on from them, as `run_trajectory` says; `also` is a network that
    they hold beside the one in training.
    """
    folder = trajectory.setting.sweep / "checkpoints" / trajectory.id
    assert trajectory.recipe is not None
    window = mask_window(trajectory)
    learner = Learner(network, trajectory.recipe, window, also)
    told, steps, attempt = [], 0, 0
    states = dict.fromkeys(trajectory.prune_ratios, "not converged")
    by = _made_by(trajectory, network)
    found = checkpoint.load(folder)
    damaged = found.damaged if found else checkpoint.generations(folder)
    changed = found is not None and found.state["made_by"] != by
    if found and not changed and _has_tickets(found, trajectory.setting.sweep):
        told, steps, attempt = (found.state[name] for name in ("told", "steps", "attempt"))
        states = dict(zip(states, found.state["states"], strict=True))
        trajectory.meter.go_on(found.state["seconds"], *found.state["joules"])
    attempt += bool(damaged or changed)
    retry = {"event": "retry", "trajectory": trajectory.id, "attempt": attempt}
    if changed:
        yield [retry | {"reason": CHANGED, "anew": True}]
    elif damaged:
        epoch = steps / trajectory.setting.batches.count(trajectory.recipe.batch_size)
        reason = f"its newest checkpoint was damaged; it went on from epoch {epoch:g}"
        yield [retry | {"reason": reason}]
    yield from told
    if told and told[-1][-1]["event"] == "trajectory":
        return
    if steps and found:
        learner.load(found)

    def state() -> dict[str, Any]:
        return {
            "made_by": by,
            "told": list(told),
            "states": list(states.values()),
            "steps": learner.steps,
            "attempt": attempt,
            "seconds": trajectory.meter.seconds(),
            "joules": trajectory.meter.joules(),
        }

    def keep() -> None:
        if writer.due:
            writer.save(learner.tensors(), state())

    newest = found.number if found else 0
    with checkpoint.Writer(folder, newest) as writer:
        for check in checks(trajectory, learner, keep):
            outcome, reason, events = "not converged", "", []
            if check.verdicts:
                events.append(check_event(trajectory, check, states))
                waiting = [ratio for ratio in trajectory.prune_ratios if states[ratio] != "drawn"]
                drawn = [ratio for ratio in waiting if due(check, ratio)]
                states |= dict.fromkeys(drawn, "drawn")
                events += draw(check, drawn)
                if set(states.values()) == {"drawn"}:
                    outcome = "drawn"
            else:
                outcome, reason = "diverged", diverged(check)
                states = {r: "drawn" if s == "drawn" else outcome for r, s in states.items()}
            told.append(events)
            if outcome != "not converged" or check.last:
                used = check.epoch, spent(trajectory, check), trajectory.meter.seconds()
                end = ending(trajectory, trajectory.method, outcome, states, *used, reason)
                events.append(end | {"distances_matrix": _matrix(window, told)})
                # Before the end is told, after which nobody may ask for more.
                writer.save({}, state(), keep=1)
                writer.wait()
                yield events
                return
            yield events
            if check.epoch.is_integer() or writer.due:
                writer.save(learner.tensors(), state())


def _matrix(window: MaskWindow, told: Iterable[Iterable[Event]]) -> dict[str, Any]:
    epochs = [event["epoch"] for events in told for event in events if event["event"] == "check"]
    numbers, matrices = window.matrix()
    return {
        "epochs": [epochs[number - 1] for number in numbers],
        "ratios": {f"{ratio:g}": rows for ratio, rows in matrices.items()},
    }


def _made_by(trajectory: Trajectory, network: nn.Module) -> dict[str, Any]:
    """What a checkpoint has to have in common with the trajectory that goes on from it."""
    shapes = [(name, *tensor.shape) for name, tensor in _tensors(network).items()]
    return made_by(trajectory.setting) | {
        "trajectory": trajectory.id,
        "method": trajectory.method,
        "penalty": trajectory.penalty,
        "seed": trajectory.seed,
        "network": hashlib.sha256(f"{network}{shapes}".encode()).hexdigest(),
    }


def made_by(setting: Setting) -> dict[str, Any]:
    """What all checkpoints of a setting have in common."""
    how = setting.numerics
    return {
        "format": checkpoint.FORMAT,
        "space": setting.space.fingerprint,
        "data": setting.dataset.fingerprint,
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
        "numerics": [how.device.type, str(how.dtype), str(how.weights), how.channels_last],
    }


def _has_tickets(found: Checkpoint, sweep: Path) -> bool:
    """Whether every ticket that it tells of is whole."""
    told = [event for events in found.state["told"] for event in events]
    tickets = [event["path"] for event in told if event["event"] == "ticket"]
    return all(is_whole(sweep / path) for path in tickets)


class Learner:
    """What changes in training: a network and its optimizer, and what goes along with them.

    `steps` are those done, and `loss` is the sum of the losses since the last check, float64.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Training,
        window: MaskWindow | None = None,
        also: nn.Module | None = None,
    ):
        self.network, self.window, self._also = network, window, also
        self.optimizer = SGD(network, recipe.momentum, recipe.weight_decay)
        self.steps, self.loss = 0, torch.zeros((), dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, copied to the CPU."""
        parts = {
            "network": _tensors(self.network),
            "optimizer": self.optimizer.state(),
            "window": self.window.state() if self.window else {},
            "also": _tensors(self._also) if self._also else {},
            "losses": {"sum": self.loss},
        }
        return {
            f"{part}.{name}": tensor.detach().to("cpu", copy=True)
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def load(self, found: Checkpoint) -> None:
        """Go on from a checkpoint whose state has the `steps` of a learner of the same things."""
        self.steps = found.state["steps"]
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "window": {}}
        for name, tensor in found.tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        for part, network in (("network", self.network), ("also", self._also)):
            for name, tensor in _tensors(network).items() if network else ():
                tensor.copy_(parts[part][name])
        self.optimizer.load(parts["optimizer"])
        self.loss = parts["losses"]["sum"]
        if self.window:
            self.window.load(parts["window"])


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


def mask_window(trajectory: Trajectory) -> MaskWindow:
    widths = [group.width for group in trajectory.setting.groups]
    return MaskWindow(trajectory.setting.space.stop_rule, trajectory.prune_ratios, widths)


def checks(trajectory: Trajectory, learner: Learner, keep: Callable[[], None]) -> Iterator[Check]:
    """Train by the trajectory's recipe, from the learner's steps on, until it ends or diverges.

    `keep` is called every few steps between checks, where there may be a checkpoint.
    """
    setting, recipe, network = trajectory.setting, trajectory.recipe, learner.network
    window = learner.window
    assert recipe is not None
    assert window is not None
    rule, batches, how = setting.space.stop_rule, setting.batches, setting.numerics
    often, count = rule.checks_per_epoch, batches.count(recipe.batch_size)
    score, ends = scorer(network, setting.groups), [0, *check_steps(count, often)]
    parts = fit(
        network,
        learner.optimizer,
        batches,
        recipe,
        ("trajectory", trajectory.seed),
        how,
        penalty=trajectory.penalty,
        checks_per_epoch=often,
        first=learner.steps,
    )
    for steps, part in parts:
        learner.steps, learner.loss = steps, learner.loss + part
        place = (steps - 1) % count + 1
        if place not in ends:
            keep()
            continue
        within, epoch = ends.index(place), steps / count
        loss = (learner.loss / (place - ends[within - 1])).item()
        learner.loss = torch.zeros_like(learner.loss)
        scores, verdicts, validation = score(), {}, None
        finite = math.isfinite(loss) and bool(scores.isfinite().all())
        if finite:
            # The published rule looks at every BatchNorm's channels, the masks at their groups.
            seen = gammas(network).cpu() if rule.rule == "paper" else scores
            verdicts = dict(zip(trajectory.prune_ratios, window.check(seen), strict=True))
            if epoch.is_integer():
                validation = accuracy(network, batches, "validation", how)
        yield Check(
            number=(steps - 1) // count * often + within,
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


def check_event(trajectory: Trajectory, check: Check, states: Mapping[float, str]) -> Event:
    """What is told of a check; `states` has `drawn` for ratios that were drawn before it."""
    rule = trajectory.setting.space.stop_rule

    def near(ratio: float) -> float:
        # Twice the limit, but clearly less than masks that have nothing to do with each other.
        chance = {"paper": 2 * ratio * (1 - ratio), "corrected": 1.0}.get(rule.rule, math.inf)
        return min(2 * rule.limit, (rule.limit + chance) / 2)

    return {
        "event": "check",
        "trajectory": trajectory.id,
        "check": check.number,
        "epoch": check.epoch,
        "loss": check.loss,
        "validation_accuracy": check.validation_accuracy,
        "distances": {f"{r:g}": verdict.distance for r, verdict in check.verdicts.items()},
        "about_to_draw": any(
            verdict.distance is not None and verdict.distance <= near(ratio)
            for ratio, verdict in check.verdicts.items()
            if states[ratio] != "drawn"
        ),
        "train_macs": spent(trajectory, check),
        "seconds": trajectory.meter.seconds(),
    }


def ending(
    trajectory: Any,
    method: str,
    state: str,
    states: Mapping[float, str],
    epochs: float,
    train_macs: int,
    seconds: float,
    reason: str = "",
) -> Event:
    """The event of the end of a trajectory, or of a point or source that failed or was ended."""
    return {
        "event": "trajectory",
        "trajectory": trajectory.id,
        "method": method,
        "penalty": trajectory.penalty,
        "seed": trajectory.seed,
        "changes": dict(getattr(trajectory, "changes", {})),
        "state": state,
        "reason": reason,
        "epochs": epochs,
        "train_macs": train_macs,
        "seconds": seconds,
        "ratios": {f"{ratio:g}": state for ratio, state in states.items()},
        "distances_matrix": {"epochs": [], "ratios": {}},
    }
