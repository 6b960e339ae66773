"""What a sweep or a comparison will do, checked before Ray starts, nothing slow imported."""

import contextlib
import itertools
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raytickets.config import InputError, Range, SearchSpace
from raytickets.journal import Event
from raytickets.sweep import Sweep

if TYPE_CHECKING:
    from raytickets.data import DataSet, Shape

Kind = Literal["sweep", "comparison"]


@dataclass(frozen=True)
class Plan:
    """A sweep or comparison whose input can be used; `opening` is the journal's first event."""

    space: SearchSpace
    folder: Path
    dataset: "DataSet"
    opening: Event


def make_plan(
    space: SearchSpace,
    *,
    name: str | None = None,
    storage: str | Path = "sweeps",
    kind: Kind = "sweep",
) -> Plan:
    """Check folder, network and data, and read the data; InputError if something cannot be used."""
    name = name or default_name(space, kind)
    folder = _writable_folder(storage, name)
    try:
        return _checked(space, folder, kind)
    except InputError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # Only if nothing is in it.
        raise


def default_name(space: SearchSpace, kind: Kind) -> str:
    """The space and the time, and what is not a sweep says so."""
    middle = "" if kind == "sweep" else f"{kind}-"
    return f"{space.name}-{middle}{time.strftime('%Y%m%d-%H%M%S')}"


def _checked(space: SearchSpace, folder: Path, kind: Kind) -> Plan:
    before = _opening(folder, space, kind)
    proposals = _extreme_proposals(space) if kind == "sweep" else []
    for changes in proposals:
        with _proposed(changes):
            space.with_changes(changes)

    # torch takes seconds to import: what needs none is refused before it.
    from raytickets.data import describe, load_data
    from raytickets.ticket import package_versions

    # Names and one image are enough to judge the network, and reading all images may take long.
    shape = describe(space.data)
    summary = _check_network(space, shape)
    for changes in proposals:
        if any(name.startswith("network.") for name in changes):
            with _proposed(changes):
                _check_network(space.with_changes(changes), shape)
    dataset = load_data(space.data)
    _check_batches(space, len(dataset.train))
    for changes in proposals:
        with _proposed(changes):
            _check_batches(space.with_changes(changes), len(dataset.train))
    opening = {
        "event": kind,
        "name": folder.name,
        "space": space.as_dict(),
        "fingerprint": space.fingerprint,
        **summary,
        "data": {
            "fingerprint": dataset.fingerprint,
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        "versions": package_versions(),
        **(_compared(space) if kind == "comparison" else {}),
    }
    if before is not None and before["data"] != opening["data"]:
        allowed = f"the images are not those that the {kind} began with; choose a new name"
        raise InputError("data.path", space.data.path, allowed)
    if space.optuna and kind == "sweep":
        from raytickets.study import check_study

        events = Sweep(folder).events() if before else []
        check_study(space, folder, dataset.fingerprint, events)
    return Plan(space, folder, dataset, before or opening)


def _writable_folder(storage: str | Path, name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError("name", name, "must be letters, digits, '.', '-' and '_'")
    if re.match(r"\w+:/", str(storage)):
        raise InputError("storage", str(storage), "must be a folder, no address")
    folder = Path(storage).expanduser().resolve() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError("storage", str(storage), f"must be writable ({error})") from error
    return folder


def _compared(space: SearchSpace) -> Event:
    """What `SearchSpace.comparison` comes to."""
    from raytickets import methods

    return {
        "penalty": methods.penalty(space),
        "prune_ratios": list(methods.prune_ratios(space)),
        "seeds": list(space.comparison.seeds),
        "methods": list(space.comparison.methods),
    }


def _opening(folder: Path, space: SearchSpace, kind: Kind) -> Event | None:
    """The first event of what the folder holds already, None for a new one."""
    sweep = Sweep(folder)
    if not (folder / "journal.jsonl").exists() or not sweep.events():
        return None
    opening = sweep.opening()
    if opening["event"] != kind:
        allowed = f"it is a {opening['event']}'s, and this is a {kind}; choose a new name"
        raise InputError("name", folder.name, allowed)
    if opening["fingerprint"] != space.fingerprint:
        before, now = _fields(opening["space"]), _fields(space.as_dict())
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        allowed = f"this {kind} began with another {', '.join(changed)}; choose a new name"
        raise InputError("name", folder.name, allowed)
    return opening


def _fields(space: Mapping[str, Any]) -> dict[str, Any]:
    """A space's fields with those of its parts, as `training.epochs`."""
    fields = {}
    for name, value in space.items():
        part = value if isinstance(value, Mapping) else {"": value}
        fields |= {f"{name}.{inner}".rstrip("."): entry for inner, entry in part.items()}
    return fields


_TOGETHER = {
    *("training.epochs", "training.batch_size"),
    *("stop_rule.window", "stop_rule.checks_per_epoch"),
}
"""Fields that are judged by each other."""


def _extreme_proposals(space: SearchSpace) -> list[dict[str, Any]]:
    """Every choice that Optuna has and both ends of every range, alone and where it matters
    together.
    """
    given = space.optuna.ranges if space.optuna else {}
    ends = {n: (v.low, v.high) if isinstance(v, Range) else v for n, v in given.items()}
    alone = [{name: value} for name, values in ends.items() for value in values]
    together = [name for name in ends if name in _TOGETHER]
    corners = itertools.product(*(ends[name] for name in together))
    return alone + [dict(zip(together, corner, strict=True)) for corner in corners]


@contextlib.contextmanager
def _proposed(changes: Mapping[str, Any]) -> Iterator[None]:
    """A refusal in here is one of what Optuna may propose."""
    try:
        yield
    except InputError as error:
        field, _, allowed = error.args
        if field == "optuna.ranges":  # It names what is no field of the space.
            raise
        shown = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        raise InputError("optuna.ranges", shown, f"{field} {allowed}") from error


def _check_batches(space: SearchSpace, images: int) -> None:
    for name in ("training", "proof", "retraining"):
        batch = getattr(space, name).batch_size
        if batch > images:
            allowed = f"must be at most {images}, the number of training images"
            raise InputError(f"{name}.batch_size", batch, allowed)
    batches = images // space.training.batch_size
    if space.stop_rule.checks_per_epoch > batches:
        checks = space.stop_rule.checks_per_epoch
        allowed = f"must be at most {batches}, the batches of an epoch"
        raise InputError("stop_rule.checks_per_epoch", checks, allowed)


def _check_network(space: SearchSpace, shape: "Shape") -> Event:
    from raytickets import cost
    from raytickets.models import check_network
    from raytickets.shrink import UnsupportedNetwork, channel_groups, check_prunable

    network = check_network(
        space.network,
        in_channels=shape.channels,
        num_classes=len(shape.classes),
        image_size=shape.size,
    )
    example = shape.example()
    try:
        groups = channel_groups(network, example)
        check_prunable(network, groups, example)
    except UnsupportedNetwork as error:
        raise InputError("network.name", space.network.name, str(error)) from error
    return {
        "channels": sum(group.width for group in groups),
        "dense": {"macs": cost.macs(network, example), "params": cost.params(network)},
    }
