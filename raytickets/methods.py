"""The methods that `raytickets compare` sets side by side, and the training that judges them.

Whatever a method does, it ends in tickets: a mask with the weights to start retraining from. Masks
go by the same groups, floor and rounding, and every ticket is then retrained alike.

`dense`: all channels, initial weights. `early_bird`: drawn as in a sweep, with the weights of the
draw; `early_bird_reinit`: the same mask, new weights. `random`: the width of `early_bird` in every
group, channels at random, weights of the same draw. `progressive`: trained to the end under the
penalty, then cut (network slimming, Liu et al. 2017, arXiv 1708.06519); `iterative`: the same in
rounds of train and cut (section 3.3 there). `lottery_ticket`: the mask of `progressive`, with the
weights of the start (Frankle and Carbin 2019, arXiv 1803.03635) or of an early epoch (Frankle et
al. 2020, arXiv 1912.05671). `snip`: cut at the start (Lee et al. 2019, arXiv 1810.02340; see
`shrink.sensitivity`). `low_precision`: `early_bird` searched with weights, BatchNorm and optimizer
in bfloat16 (see `train.SGD`), where channels tie, and ties at the cut go together; 8-bit training,
as in the paper, is not offered, since no maintained library has it for convolutions (torchao trains
linear layers alone, PyTorch's quantisation-aware training rounds the forward pass alone).
"""

import copy
import dataclasses
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytickets import checkpoint, cost
from raytickets.config import Method, SearchSpace
from raytickets.cost import Ledger
from raytickets.draw import Check, Setting, Trajectory, cut_groups, write_ticket
from raytickets.energy import Meter
from raytickets.journal import Event
from raytickets.masks import to_text
from raytickets.shrink import (
    ChannelGroup,
    emptied,
    narrowed,
    scorer,
    sensitivity,
    shrink,
)
from raytickets.ticket import has_lost, load_ticket, save_retrained
from raytickets.train import epoch_event, fit, retrained_event, seed_of, seeded
from raytickets.trajectory import (
    CHANGED,
    Learner,
    check_event,
    checks,
    converged,
    dense_network,
    diverged,
    ending,
    made_by,
    mask_window,
    spent,
    until_drawn,
)

SOURCES: dict[str, tuple[Method, ...]] = {
    "dense": ("dense",),
    "early_bird": ("early_bird", "early_bird_reinit", "random"),
    "progressive": ("progressive", "lottery_ticket"),
    "iterative": ("iterative",),
    "snip": ("snip",),
    "low_precision": ("low_precision",),
}
"""What finds the tickets of which methods."""

SNIP_BATCH = 128
"""Images that `snip` looks at, at least."""


@dataclass(frozen=True)
class Source:
    """A piece of a comparison's search: one training, or one look, that tickets are taken from."""

    kind: str
    penalty: float
    """0 where nothing is trained under one."""
    seed: int

    @property
    def id(self) -> str:
        return f"{self.kind}-penalty{self.penalty:g}-seed{self.seed}"


def penalty(space: SearchSpace) -> float:
    """What a comparison's methods train under: the middle one of the space unless it says."""
    if space.comparison.penalty is not None:
        return space.comparison.penalty
    return sorted(space.penalties)[len(space.penalties) // 2]


def prune_ratios(space: SearchSpace) -> tuple[float, ...]:
    """Those of a comparison."""
    return space.comparison.prune_ratios or space.prune_ratios


def sources(space: SearchSpace) -> list[Source]:
    """Everything that the comparison's methods need, seed by seed."""
    wanted = set(space.comparison.methods)
    return [
        Source(kind, 0.0 if kind in ("dense", "snip") else penalty(space), seed)
        for seed in space.comparison.seeds
        for kind, methods in SOURCES.items()
        if wanted & set(methods)
    ]


def run_source(setting: Setting, source: Source) -> Iterator[list[Event]]:
    """Do a source's work: lists of the events it made, the last of which tells how it ended.

    Tickets are on disk under `tickets` in the comparison's folder when their events are yielded.
    A ratio that does not draw has no ticket.
    """
    space = setting.space
    if source.kind == "low_precision":
        low = dataclasses.replace(setting.numerics, dtype=torch.bfloat16, weights=torch.bfloat16)
        setting = dataclasses.replace(setting, numerics=low)
    work, recipe = {
        "dense": (_dense, None),
        "early_bird": (_early_bird, space.training),
        "progressive": (_progressive, space.retraining),
        "iterative": (_iterative, space.retraining),
        "snip": (_snip, None),
        "low_precision": (_early_bird, space.training),
    }[source.kind]
    trajectory = Trajectory(
        setting=setting,
        id=source.id,
        method=source.kind,
        penalty=source.penalty,
        seed=source.seed,
        recipe=recipe,
        meter=setting.meter(),
        prune_ratios=(0.0,) if source.kind == "dense" else prune_ratios(space),
    )
    yield from work(trajectory, setting.numerics.place(_initial(setting, source.seed)))


def _initial(setting: Setting, seed: int) -> nn.Module:
    return dense_network(setting.space, setting.dataset, seed)


def _dense(trajectory: Trajectory, network: nn.Module) -> Iterator[list[Event]]:
    setting = trajectory.setting
    joules, energy = trajectory.meter.joules()
    nothing = Ledger(0, 0, 0, 0.0, None if joules is None else 0.0, energy)
    mask = _everything(setting)
    event = _ticket(trajectory, "dense", 0.0, nothing, network, mask, mask)
    used = 0.0, 0, trajectory.meter.seconds()
    yield [event, ending(trajectory, "dense", "drawn", {0.0: "drawn"}, *used)]


def _snip(trajectory: Trajectory, network: nn.Module) -> Iterator[list[Event]]:
    setting = trajectory.setting
    size = max(SNIP_BATCH, setting.space.retraining.batch_size)
    images, labels = next(setting.batches.training(size, seeded("snip", trajectory.seed)))
    looked = copy.deepcopy(network).requires_grad_(True)
    torch.manual_seed(seed_of("dropout", trajectory.seed))
    F.cross_entropy(setting.numerics.exact.logits(looked, images), labels).backward()
    scores = sensitivity(looked, setting.groups)
    ledger = _ledger(trajectory.meter, setting.dense_macs, len(labels))
    events = [
        _ticket(trajectory, "snip", ratio, ledger, network, *cut_groups(setting, scores, ratio))
        for ratio in trajectory.prune_ratios
    ]
    states = dict.fromkeys(trajectory.prune_ratios, "drawn")
    macs = cost.training_macs(setting.dense_macs, len(labels))
    used = 0.0, macs, trajectory.meter.seconds()
    yield [*events, ending(trajectory, "snip", "drawn", states, *used)]


def _early_bird(trajectory: Trajectory, network: nn.Module) -> Iterator[list[Event]]:
    setting, seed = trajectory.setting, trajectory.seed
    new = _initial(setting, seed_of("reinit", seed))

    def draw(check: Check, ratios: Sequence[float]) -> Iterator[Event]:
        ledger = _ledger(trajectory.meter, setting.dense_macs, check.samples)
        for ratio in ratios:
            mask, chosen = cut_groups(setting, check.scores, ratio)
            other = random_mask(setting.groups, mask, seeded("random", seed, ratio))
            found = {
                trajectory.method: (network, mask, chosen),
                "early_bird_reinit": (new, mask, chosen),
                "random": (network, other, other),
            }
            for method in _asked(trajectory):
                yield _ticket(trajectory, method, ratio, ledger, *found[method], check)

    yield from until_drawn(trajectory, network, converged, draw)


def _progressive(trajectory: Trajectory, network: nn.Module) -> Iterator[list[Event]]:
    setting = trajectory.setting
    rewind, early = setting.space.comparison.rewind, copy.deepcopy(network)

    def draw(check: Check, ratios: Sequence[float]) -> Iterator[Event]:
        ledger = _ledger(trajectory.meter, setting.dense_macs, check.samples)
        weights = {"progressive": network, "lottery_ticket": early}
        for ratio in ratios:
            mask, chosen = cut_groups(setting, check.scores, ratio)
            for method in _asked(trajectory):
                yield _ticket(trajectory, method, ratio, ledger, weights[method], mask, chosen)

    for events in until_drawn(trajectory, network, lambda check, _: check.last, draw, early):
        # Of events that are told again the checkpoint's weights, which are loaded after them, hold.
        if rewind and events[0].get("epoch") == rewind:
            early.load_state_dict(network.state_dict())
        yield events


def _iterative(trajectory: Trajectory, network: nn.Module) -> Iterator[list[Event]]:
    setting, whole = trajectory.setting, _everything(trajectory.setting)
    rounds = setting.space.comparison.rounds
    first = yield from _train(trajectory, network, whole, "all", [])  # Every prune ratio's.
    done, states, failure = [first], {}, ""
    for ratio in trajectory.prune_ratios:
        latest, small, mask, chosen, ledger = first, network, whole, whole, first.ledger
        for number in range(1, rounds + 1):
            if latest.failure:
                break
            narrower, chosen = cut_groups(setting, latest.scores, ratio * number / rounds)
            small = setting.numerics.place(shrink(small, latest.groups, narrower[mask]))
            mask = narrower
            if number < rounds:
                name = f"{ratio:g}-{number}"
                latest = yield from _train(trajectory, small, mask, name, done)
                done.append(latest)
                ledger += latest.ledger
        states[ratio] = "diverged" if latest.failure else "drawn"
        failure = failure or latest.failure
        if not latest.failure:
            event = write_ticket(trajectory, "iterative", ratio, small, mask, chosen)
            yield [event | {"search": dataclasses.asdict(ledger)}]
    state = "diverged" if failure else "drawn"
    epochs, macs = sum(part.epochs for part in done), sum(part.train_macs for part in done)
    seconds = sum(part.ledger.seconds for part in done)
    yield [ending(trajectory, "iterative", state, states, epochs, macs, seconds, failure)]


@dataclass(frozen=True)
class _Round:
    """What training a network that a mask describes came to."""

    groups: tuple[ChannelGroup, ...]
    """Of that network."""
    scores: Tensor
    """Of all channels; those that the mask drops are below all others."""
    epochs: float
    train_macs: int
    ledger: Ledger
    failure: str


def _train(
    trajectory: Trajectory, network: nn.Module, mask: Tensor, name: str, before: Sequence[_Round]
) -> Generator[list[Event], None, _Round]:
    """Train the network of a mask to the end, in place, from the round's last checkpoint on.

    Yields the event of every check. They count on from those of the rounds before, and have no
    distances: masks of other networks are not compared.
    """
    recipe = trajectory.recipe
    assert recipe is not None
    example = trajectory.setting.dataset.shape.example()
    setting = dataclasses.replace(
        trajectory.setting,
        groups=narrowed(trajectory.setting.groups, mask),
        dense_macs=cost.macs(network, example.to(trajectory.setting.numerics.device)),
    )
    here, meter = dataclasses.replace(trajectory, setting=setting), setting.meter()
    learner = Learner(network, recipe, mask_window(here))
    folder = setting.sweep / "checkpoints" / trajectory.id / name
    # Rounds before this one that ran again may have come to another mask.
    by = made_by(setting) | {"mask": to_text(mask)}
    found, told, failure = checkpoint.load(folder), [], ""
    if found and found.state["made_by"] == by:
        told = found.state["told"]
        yield list(told)
        learner.load(found)
        meter.go_on(found.state["seconds"], *found.state["joules"])
    elif found and not before:  # What begins a source anew does so for all of its rounds.
        retry = {"event": "retry", "trajectory": trajectory.id, "attempt": 1}
        yield [retry | {"reason": CHANGED, "anew": True}]

    def event(check: Check) -> Event:
        epochs = len(before) * recipe.epochs
        counted = dataclasses.replace(
            check,
            number=epochs * setting.space.stop_rule.checks_per_epoch + check.number,
            epoch=epochs + check.epoch,
            verdicts={},
        )
        return check_event(here, counted, {}) | {
            "train_macs": sum(part.train_macs for part in before) + spent(here, check),
            "seconds": sum(part.ledger.seconds for part in before) + meter.seconds(),
        }

    def save(keep: int = 2) -> None:
        state = {"made_by": by, "told": list(told), "steps": learner.steps}
        state |= {"seconds": meter.seconds(), "joules": meter.joules()}
        writer.save(learner.tensors(), state, keep=keep)

    def due() -> None:
        if writer.due:
            save()

    with checkpoint.Writer(folder, found.number if found else 0) as writer:
        for check in checks(here, learner, due):
            if not check.verdicts:
                failure = diverged(check)
                continue
            told.append(event(check))
            yield told[-1:]
            if check.epoch.is_integer() or writer.due:
                save(keep=1 if check.last else 2)
    samples = learner.steps * recipe.batch_size
    scores = torch.full(mask.shape, -torch.inf)
    scores[mask] = scorer(network, setting.groups)()
    return _Round(
        groups=setting.groups,
        scores=scores,
        epochs=learner.steps / setting.batches.count(recipe.batch_size),
        train_macs=cost.training_macs(setting.dense_macs, samples),
        ledger=_ledger(meter, setting.dense_macs, samples),
        failure=failure,
    )


def random_mask(groups: Sequence[ChannelGroup], mask: Tensor, generator: torch.Generator) -> Tensor:
    """A mask that keeps as many channels of every group as this one, at random, and some of each of
    its modules.

    Both are bool [channels over all groups].
    """
    drawn = []
    for group, part in zip(groups, mask.split([group.width for group in groups]), strict=True):
        while True:
            shuffled = part[torch.randperm(len(part), generator=generator)]
            if not any(emptied(group, shuffled)):
                break
        drawn.append(shuffled)
    return torch.cat(drawn)


def _everything(setting: Setting) -> Tensor:
    return torch.ones(sum(group.width for group in setting.groups), dtype=torch.bool)


def _asked(trajectory: Trajectory) -> list[Method]:
    asked = trajectory.setting.space.comparison.methods
    return [method for method in SOURCES[trajectory.method] if method in asked]


def _ticket(
    trajectory: Trajectory,
    method: str,
    ratio: float,
    ledger: Ledger,
    network: nn.Module,
    mask: Tensor,
    chosen: Tensor,
    check: Check | None = None,
) -> Event:
    shrunk = shrink(network, trajectory.setting.groups, mask)
    event = write_ticket(trajectory, method, ratio, shrunk, mask, chosen, check)
    return event | {"search": dataclasses.asdict(ledger)}


def _ledger(meter: Meter, macs: int, samples: int) -> Ledger:
    """What a meter's work came to, for a network of so many forward MACs trained on samples."""
    joules, energy = meter.joules()
    forward = macs * samples
    # The backward pass counts as two forward passes, as in `cost.training_macs`.
    return Ledger(forward, 2 * forward, samples, meter.seconds(), joules, energy)


def retrain_alone(setting: Setting, path: Path) -> Iterator[list[Event]]:
    """Retrain the ticket in a folder in this process, by the space's `retraining`.

    Yields the event of every epoch, and at last of the retrained ticket, which is then on disk
    under `retrained` in the comparison's folder. The ledger counts the epochs and their look at
    validation images. It makes checkpoints, and goes on from them, as `run_trajectory` does.
    """
    recipe, batches, how = setting.space.retraining, setting.batches, setting.numerics
    ticket, meter = load_ticket(path, trust_code=True), setting.meter()
    seed, macs = ticket.manifest["seed"], ticket.manifest["macs"]
    learner = Learner(how.place(ticket.network()), recipe)
    folder, by = setting.sweep / "checkpoints" / ticket.id / "alone", made_by(setting)
    found = checkpoint.load(folder)
    damaged = found.damaged if found else checkpoint.generations(folder)
    newest = found.number if found else 0
    told, attempt = (found.state["told"], found.state["attempt"]) if found else ([], 0)
    changed = found is not None and found.state["made_by"] != by
    if changed or has_lost(setting.sweep, told):
        found, told = None, []
    attempt += bool(damaged or changed)
    retry = {"event": "retry", "run": ticket.id, "attempt": attempt}
    if changed:
        yield [retry | {"reason": CHANGED, "anew": True}]
    elif damaged:
        reason = f"{len(damaged)} damaged checkpoints; it went on from epoch {len(told)}"
        yield [retry | {"reason": reason}]
    if found:
        yield list(told)
        if told and told[-1]["event"] == "retrained":
            return
        learner.load(found)
        meter.go_on(found.state["seconds"], *found.state["joules"])

    def state() -> dict[str, Any]:
        return {
            "made_by": by,
            "told": list(told),
            "attempt": attempt,
            "steps": learner.steps,
            "seconds": meter.seconds(),
            "joules": meter.joules(),
        }

    network, count = learner.network, batches.count(recipe.batch_size)
    purpose = ("retrain", seed)
    parts = fit(network, learner.optimizer, batches, recipe, purpose, how, first=learner.steps)
    with checkpoint.Writer(folder, newest) as writer:
        for steps, part in parts:
            learner.steps, learner.loss = steps, learner.loss + part
            if steps % count == 0:
                epoch, loss = steps // count, (learner.loss / count).item()
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss was {loss} in epoch {epoch}")
                told.append(epoch_event(ticket.id, epoch, loss, network, batches, recipe, how))
                yield told[-1:]
                learner.loss = torch.zeros_like(learner.loss)
            if steps % count == 0 or writer.due:
                writer.save(learner.tensors(), state())
        samples = recipe.epochs * count * recipe.batch_size
        ledger = _ledger(meter, macs, samples)
        event = retrained_event(ticket.id, meter.seconds(), network, macs, batches, recipe, how)
        dense = how.exact.place(_initial(setting, seed))
        example = setting.dataset.shape.example().to(how.device)
        latency, dense_latency = cost.latencies([network, dense], example)
        saved = save_retrained(setting.sweep / "retrained", path, network, event)
        event |= {
            "path": str(saved.path.relative_to(setting.sweep)),
            "ledger": dataclasses.asdict(ledger),
            "latency_ms": latency,
            "relative_latency": latency / dense_latency,
        }
        told.append(event)
        writer.save({}, state(), keep=1)
        writer.wait()
        yield [event]
