"""What a sweep is going to do, checked before Ray starts and with nothing slow to import."""

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytickets.config import InputError, SearchSpace
from raytickets.journal import Event
from raytickets.sweep import Sweep

if TYPE_CHECKING:
    from raytickets.data import DataSet, Shape


@dataclass(frozen=True)
class Plan:
    """A sweep whose input can be used; `opening` is the journal's first event."""

    space: SearchSpace
    folder: Path
    dataset: "DataSet"
    opening: Event


def make_plan(
    space: SearchSpace, *, name: str | None = None, storage: str | Path = "sweeps"
) -> Plan:
    """Check folder, network and data, and read the data; InputError if something cannot be used."""
    name = name or f"{space.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = _writable_folder(storage, name)
    try:
        return _checked(space, folder)
    except InputError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # Only if nothing is in it.
        raise


def _checked(space: SearchSpace, folder: Path) -> Plan:
    before = _opening(folder, space)

    # torch takes seconds to import: what needs none is refused before it.
    from raytickets.data import describe, load_data
    from raytickets.ticket import package_versions

    # Names and one image are enough to judge the network, and reading all images may take long.
    summary = _check_network(space, describe(space.data))
    dataset = load_data(space.data)
    for name in ("training", "proof", "retraining"):
        batch = getattr(space, name).batch_size
        if batch > len(dataset.train):
            allowed = f"must be at most {len(dataset.train)}, the number of training images"
            raise InputError(f"{name}.batch_size", batch, allowed)
    batches = len(dataset.train) // space.training.batch_size
    if space.stop_rule.checks_per_epoch > batches:
        checks = space.stop_rule.checks_per_epoch
        allowed = f"must be at most {batches}, the batches of an epoch"
        raise InputError("stop_rule.checks_per_epoch", checks, allowed)
    opening = {
        "event": "sweep",
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
    }
    if before is not None and before["data"] != opening["data"]:
        allowed = "the images are not those that the sweep began with; choose a new name"
        raise InputError("data.path", space.data.path, allowed)
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


def _opening(folder: Path, space: SearchSpace) -> Event | None:
    """The first event of a sweep to go on with, None for a new one."""
    sweep = Sweep(folder)
    if not (folder / "journal.jsonl").exists() or not sweep.events():
        return None
    opening = sweep.opening()
    if opening["fingerprint"] != space.fingerprint:
        before, now = _fields(opening["space"]), _fields(space.as_dict())
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        allowed = f"this sweep began with another {', '.join(changed)}; choose a new name"
        raise InputError("name", folder.name, allowed)
    return opening


def _fields(space: Mapping[str, Any]) -> dict[str, Any]:
    """A space's fields with those of its parts, as `training.epochs`."""
    fields = {}
    for name, value in space.items():
        part = value if isinstance(value, Mapping) else {"": value}
        fields |= {f"{name}.{inner}".rstrip("."): entry for inner, entry in part.items()}
    return fields


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
