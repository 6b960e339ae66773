"""What a sweep is going to do, checked before Ray starts and with nothing slow to import."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from raytickets import cost
from raytickets.config import InputError, SearchSpace
from raytickets.data import DataSet, Shape, describe, load_data
from raytickets.journal import Event
from raytickets.models import check_network
from raytickets.shrink import UnsupportedNetwork, channel_groups, check_prunable
from raytickets.sweep import Sweep, first
from raytickets.ticket import package_versions


@dataclass(frozen=True)
class Plan:
    """A sweep whose input can be used; `opening` is the journal's first event."""

    space: SearchSpace
    folder: Path
    dataset: DataSet
    opening: Event


def make_plan(
    space: SearchSpace, *, name: str | None = None, storage: str | Path = "sweeps"
) -> Plan:
    """Check folder, network and data, and read the data; InputError if something cannot be used."""
    name = name or f"{space.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = _writable_folder(storage, name)
    before = _opening(folder, space)
    # Names and one image are enough to judge the network, and reading all images may take long.
    summary = _check_network(space, describe(space.data))
    dataset = load_data(space.data)
    batch = max(recipe.batch_size for recipe in (space.training, space.proof, space.retraining))
    if batch > len(dataset.train):
        allowed = f"there are {len(dataset.train)} training images"
        raise InputError("training.batch_size", batch, allowed)
    opening = {
        "event": "sweep",
        "name": name,
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
        raise InputError("data", space.data.path, "the images are not those the sweep began with")
    return Plan(space, folder, dataset, before or opening)


def _writable_folder(storage: str | Path, name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError("name", name, "must be letters, digits, '.', '-' and '_'")
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
    if not (folder / "journal.jsonl").exists() or not (events := Sweep(folder).events()):
        return None
    opening = first(events, "sweep")
    if opening["fingerprint"] != space.fingerprint:
        before, now = opening["space"], space.as_dict()
        changed = [name for name in now if before.get(name) != now[name]]
        allowed = f"this sweep began with another {', '.join(changed)}; choose a new name"
        raise InputError("name", folder.name, allowed)
    return opening


def _check_network(space: SearchSpace, shape: Shape) -> Event:
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
