"""What a sweep or a comparison will do, checked before Ray starts, nothing slow imported."""

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from socket import create_connection
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from raytickets.comparison import source_count
from raytickets.config import InputError, Range, SearchSpace, changed_fields
from raytickets.journal import NAME, Event, mend_journal
from raytickets.lease import FILE, Lease, hold
from raytickets.storage import address, local, names
from raytickets.sweep import Sweep, select, standing

if TYPE_CHECKING:
    from raytickets.data import DataSet, Shape

Kind = Literal["sweep", "comparison"]


SPARE_BYTES = 100_000_000
"""What is to be free on the disk besides checkpoints and tickets: journal, figures, Ray's files."""


class SweepChanged(InputError):
    """The sweep of this name began with another space or other images."""


@dataclass(frozen=True)
class Plan:
    """A sweep or comparison whose input can be used; `opening` is the journal's first event."""

    space: SearchSpace
    folder: Path
    dataset: "DataSet"
    opening: Event
    notes: tuple[str, ...] = ()
    """What a person is to know of a folder that was not new."""
    lease: Lease | None = None
    """The folder's, None where nothing is going to run."""


@contextlib.contextmanager
def opened(
    space: SearchSpace,
    *,
    name: str | None = None,
    storage: str | Path = "sweeps",
    kind: Kind = "sweep",
    new: bool = False,
    series: bool = False,
) -> Iterator[Plan]:
    """`make_plan`'s, with the folder's lease held; Held if another process does.

    With `series`, `name` is that of a series. Its sweeps are numbered: the newest goes on if it has
    not ended, or has failed once. Else the next one starts, as it does if the space or the images
    changed. The lease of a sweep's series is held too.
    """
    name = default_name(space, kind) if name is None else name
    folder = sweep_folder(storage, name)
    with contextlib.ExitStack() as held:

        def lease_of(folder: Path) -> Lease:
            try:
                return held.enter_context(hold(folder))
            except OSError as error:
                raise InputError("storage", str(storage), f"must be writable ({error})") from error

        lease, plan = lease_of(folder), None
        if series:
            newest, following = _numbered(folder)
            if newest:
                lease = lease_of(sweep_folder(storage, newest))
                with contextlib.suppress(SweepChanged):
                    plan = make_plan(space, name=newest, storage=storage, kind=kind, series=name)
            if plan is None:
                lease = lease_of(sweep_folder(storage, following))
                plan = make_plan(space, name=following, storage=storage, kind=kind, series=name)
        else:
            plan = make_plan(space, name=name, storage=storage, kind=kind, new=new)
            if of := plan.opening.get("series"):  # They have Optuna's study in common.
                lease_of(sweep_folder(storage, of))
        yield dataclasses.replace(plan, lease=lease)


def _numbered(series: Path) -> tuple[str | None, str]:
    """The newest sweep of a series, if it is to go on, and the name of the next one."""
    number = re.compile(rf"{re.escape(series.name)}-(\d{{4,}})")
    found = [number.fullmatch(one) for one in names(series.parent)]
    last = max((int(match[1]) for match in found if match), default=0)
    newest = f"{series.name}-{last:04d}" if last else None
    if newest and _is_over(Sweep(series.parent / newest)):
        newest = None
    return newest, f"{series.name}-{last + 1:04d}"


def _is_over(sweep: Sweep) -> bool:
    """It is done, or has failed twice: what fails every time is not to keep the next one away."""
    try:
        states = [event["state"] for event in select(sweep.fetched().events(), "end")]
    except InputError:  # It has no journal yet, or one that is to be mended first.
        return False
    return states[-1:] == ["done"] or states.count("failed") > 1


def make_plan(
    space: SearchSpace,
    *,
    name: str | None = None,
    storage: str | Path = "sweeps",
    kind: Kind = "sweep",
    new: bool = False,
    series: str | None = None,
) -> Plan:
    """Check folder, network and data, and read the data; InputError if something cannot be used.

    A damaged journal is mended; what was begun with another space or other images is SweepChanged.
    With `new` all that the folder holds is kept under another name, and it starts anew. `series`
    is the one that the sweep is of.
    """
    name = default_name(space, kind) if name is None else name
    folder = sweep_folder(storage, name)
    try:
        if new and address(folder) != str(folder):
            raise InputError("new", new, "is for folders; choose a new name at an address")
        mended = mend_journal(folder)
        before = None if new else _opening(folder, space, kind)
        plan = _checked(space, folder, kind, before, series)
    except InputError:
        _discard(folder)
        raise
    moved = _set_aside(folder) if new else None
    found = standing(Sweep(folder).events()) if before else None
    notes = tuple(note for note in (mended, moved, found) if note)
    return dataclasses.replace(plan, notes=notes)


def _set_aside(folder: Path) -> str | None:
    """Move what the folder holds to another one, the journal last: as long as it is here, the same
    call goes on with it.
    """
    held = sorted(folder.iterdir(), key=lambda path: path.name == NAME)
    held = [path for path in held if path.name != FILE]
    if not held:
        return None
    kept = folder.with_name(f"{folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
    for half in folder.parent.glob(f"{folder.name}-before-[0-9]*-[0-9]*"):
        if (folder / NAME).exists() and not any((half / path.name).exists() for path in held):
            kept = half  # This was killed on its way there.
            break
    else:
        kept.mkdir()
    for path in held:
        path.rename(kept / path.name)
    return f"what {folder.name} held is kept in {address(kept)}"


def _discard(folder: Path) -> None:
    """Remove what was made for a start that was refused, if nothing else is in it."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} == {FILE}:
            (folder / FILE).unlink()
        folder.rmdir()


def default_name(space: SearchSpace, kind: Kind) -> str:
    """The space and the time, and what is not a sweep says so."""
    middle = "" if kind == "sweep" else f"{kind}-"
    return f"{space.name}-{middle}{time.strftime('%Y%m%d-%H%M%S')}"


def _checked(
    space: SearchSpace, folder: Path, kind: Kind, before: Event | None, series: str | None
) -> Plan:
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
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
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
        **({"series": series} if series else {}),
    }
    _check_free(space, folder, opening, begun=before is not None)
    if before is not None and before["data"] != opening["data"]:
        allowed = f"the images are not those that the {kind} began with; {_ANEW}"
        raise SweepChanged("data.path", space.data.path, allowed)
    if space.optuna and kind == "sweep":
        from raytickets.study import check_study

        events = Sweep(folder).events() if before else []
        check_study(space, folder, dataset.fingerprint, events)
    return Plan(space, folder, dataset, before or opening)


_ANEW = "choose a new name, or start anew with --new, which keeps what is there"


def sweep_folder(storage: str | Path, name: str) -> Path:
    """The folder of this name, made if there is none; InputError if it cannot be written."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        allowed = "must be letters, digits, '.', '-' and '_', and begin with one of the first two"
        raise InputError("name", name, allowed)
    folder = local(storage) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise InputError("storage", str(storage), f"must be writable ({error})") from error
    return folder


def _check_free(space: SearchSpace, folder: Path, opening: Event, begun: bool) -> None:
    """InputError if the disk has no room for what this is going to write."""
    count = source_count(opening) if opening["event"] == "comparison" else space.trajectories
    at_once = min(count, os.cpu_count() or 1) + 1  # A retraining keeps checkpoints too.
    tickets = count * len(opening.get("prune_ratios", space.prune_ratios))
    # float32 weights and momenta in two generations and the one that is being written.
    needed = SPARE_BYTES + 4 * opening["dense"]["params"] * (at_once * 2 * 3 + tickets)
    free = shutil.disk_usage(folder).free
    if free < (SPARE_BYTES if begun else needed):
        allowed = f"needs about {needed / 1e6:,.0f} MB of space, and has {free / 1e6:,.0f} MB left"
        raise InputError("storage", address(folder.parent), allowed)


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
    if not (folder / NAME).exists() or not sweep.events():
        return None
    opening = sweep.opening()
    if opening["event"] != kind:
        allowed = f"it is a {opening['event']}'s, and this is a {kind}; choose a new name"
        raise InputError("name", folder.name, allowed)
    if opening["fingerprint"] != space.fingerprint:
        changed = changed_fields(opening["space"], space.as_dict())
        allowed = f"this {kind} began with another {', '.join(changed)}; {_ANEW}"
        raise SweepChanged("name", folder.name, allowed)
    return opening


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
    from raytickets.manifest import check_storable
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
    check_storable(space.network, [group.name for group in groups])
    return {
        "channels": sum(group.width for group in groups),
        "dense": {"macs": cost.macs(network, example), "params": cost.params(network)},
    }


def check_services(address: str | None, tracking_uri: str | None) -> None:
    """InputError if Ray or MLflow cannot be used, where that shows without importing them."""
    deadline_s()
    ray_address(address)
    check_store(tracking_uri)


def deadline_s() -> float:
    """How long no machine at all may come: from launching one to having installed all on it."""
    given = os.environ.get("RAYTICKETS_DEADLINE_S", "1800")
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InputError("RAYTICKETS_DEADLINE_S", given, "must be a number of seconds, at least 0")
    return seconds


def ray_address(given: str | None) -> tuple[str, str]:
    """The field that says where Ray is, and what it says: auto, local or host:port."""
    field = "address" if given else "RAY_ADDRESS"
    address = given or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("auto", "local"):
        if "://" in address or ":" not in address:
            submit = "from elsewhere: ray job submit (cluster/README.md)"
            raise InputError(field, address, f"must be auto or host:port; {submit}")
        try:
            place = urlsplit(f"//{address}")
            # Ray itself waits for minutes for a head node that is not there.
            create_connection((place.hostname, place.port), timeout=3).close()
        except (OSError, ValueError) as error:
            raise InputError(field, address, f"no Ray cluster answers ({error})") from error
    return field, address


_STORES = {"sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks"}
"""What MLflow has stores for, besides plugins, and folders where MLFLOW_ALLOW_FILE_STORE is set."""


def check_store(given: str | None) -> None:
    """InputError on an MLflow store that cannot be used, where that shows without MLflow."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    try:
        place = urlsplit(uri)
        port = place.port
    except ValueError:  # Its text may hold a part of the password.
        allowed = "must be an address, as https://user:password@host:port, with %2F for / and so on"
        raise InputError("tracking_uri", f"{uri.partition(':')[0]}:...", allowed) from None
    try:
        kind = place.scheme.partition("+")[0] or uri
        folder = place.scheme in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE")
        known = kind in _STORES or folder
        if not known and not entry_points(group="mlflow.tracking_store", name=kind):
            raise ValueError("must be a database or a server, as sqlite:///mlflow.db")
        if kind in ("http", "https") and (not place.hostname or port == 0):
            raise ValueError("no host in this address")
        if place.scheme == "sqlite":
            _check_database(uri)
    except (OSError, ValueError) as error:
        shown = re.sub(r"//\S*@", "//***@", uri).partition("?")[0]
        raise InputError("tracking_uri", shown, str(error)) from error


def _check_database(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///")).absolute()
    if not uri.startswith("sqlite:///") or uri == "sqlite:///":
        raise ValueError("a file is missing: sqlite:///<path>")
    if path.exists():
        path.open("r+b").close()
    # Nothing is left of it, whatever comes of this.
    tempfile.TemporaryFile(dir=next(above for above in path.parents if above.exists())).close()
