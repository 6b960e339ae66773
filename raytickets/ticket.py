"""Tickets on disk: weights as safetensors, everything else as a JSON manifest, checksummed."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from raytickets import storage
from raytickets.config import InputError, Network
from raytickets.manifest import LARGEST, SCHEMA, WEIGHTS, parse
from raytickets.masks import from_text, to_text
from raytickets.models import build_network
from raytickets.shrink import ChannelGroup, UnsupportedNetwork, channel_groups, shrink
from raytickets.storage import sync

MANIFEST = "manifest.json"

_MOST_WEIGHTS = 2**30
_MOST_BYTES = 16 * _MOST_WEIGHTS
"""Of a network before it is shrunk; torchvision's largest has 0.65e9."""

_DAY = 86_400


class Untrusted(InputError):
    """The ticket's network is not built unless the ticket was loaded with `trust_code`."""


class DamagedTicket(ValueError):
    """A ticket's files are missing, incomplete or not what its manifest says."""

    def __str__(self) -> str:
        """One printable line, whatever the files hold."""
        text = ": ".join(map(str, self.args))
        return "".join(char if char.isprintable() else "?" for char in text)[:600]


@dataclass(frozen=True)
class Ticket:
    """A verified ticket in a folder; `load_ticket` makes one.

    `manifest` holds, besides `schema` and `id`: `network` (name, options, in_channels,
    num_classes, image_size), `groups` (of each channel group its name, the mask and, before
    `min_channels` and `round_to` added channels back, the cut; one character a channel, 1 for
    kept), `min_channels` (least, acted_on), `round_to`, `penalty`, `prune_ratio`, `learning_rate`,
    `seed`, `threads`, `precision` (bfloat16 or float32), `stop_rule` (rule, window, threshold,
    checks_per_epoch, distances), `draw` (check, and epoch as a fraction), `space` (name,
    fingerprint), `data` (fingerprint), `macs`, `params`, `versions`, `files` (SHA-256 of each) and
    `method`, the one of `raytickets.methods` that made it. `stop_rule` and `draw` are null where a
    method does not draw, `learning_rate` where it does not train before retraining. A retrained
    ticket also has `retrained`.
    """

    path: Path
    manifest: Mapping[str, Any]
    trust_code: bool = False

    @property
    def id(self) -> str:
        return self.manifest["id"]

    @property
    def mask(self) -> Tensor:
        """bool [channels over all groups], True for kept."""
        return from_text("".join(group["mask"] for group in self.manifest["groups"]))

    def network(self) -> nn.Module:
        """The shrunk network with the ticket's weights, float32 on the CPU, in eval mode.

        No memory is taken but for these weights, and names, shapes and dtypes have to be those of
        the network. Raises InputError if the network cannot be built; Untrusted if it is the user's
        own code, or timm's with options, and the ticket was loaded without `trust_code`;
        DamagedTicket if weights and mask do not fit it.
        """
        try:
            found = safetensors.torch.load_file(self.path / WEIGHTS)
        except (OSError, safetensors.SafetensorError) as error:
            raise DamagedTicket(f"{self.path}: {error}") from error
        own_code = ":" in self.manifest["network"]["name"]
        # The user's own code may compute with its weights while it makes them.
        with contextlib.nullcontext() if own_code else _unallocated(2 * len(found) + 100):
            dense = self._dense(seed=0)
        buffers = {name: buffer.clone() for name, buffer in dense.named_buffers()}
        network = self._shrunk(dense if own_code else dense.to("meta"))
        expected = {name: (t.shape, t.dtype) for name, t in network.state_dict().items()}
        if {name: (t.shape, t.dtype) for name, t in found.items()} != expected:
            raise DamagedTicket(f"{self.path}: its weights are not those of the masked network")
        # A copy: the file's own pages would follow what becomes of the file.
        weights = {name: tensor.clone() for name, tensor in found.items()}
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise DamagedTicket(f"{self.path}: a weight of {name} is not finite")
        network.load_state_dict(weights, assign=True)
        for name in buffers.keys() - expected.keys():  # those that a network makes for itself
            module, _, buffer = name.rpartition(".")
            setattr(network.get_submodule(module), buffer, buffers[name])
        return network.eval()

    def fresh_network(self, seed: int) -> nn.Module:
        """The same shrunk shape with new weights drawn from the seed; errors as `network`.

        The network is built whole and then shrunk.
        """
        self.network()  # which refuses one that is not what the weights say before it is built
        return self._shrunk(self._dense(seed))

    def _dense(self, seed: int) -> nn.Module:
        spec = self.manifest["network"]
        # What timm computes from options takes memory before it can be counted.
        timm = spec["name"].startswith("timm/")
        if not self.trust_code and (spec["options"] if timm else ":" in spec["name"]):
            what = "timm's with options" if timm else "code of its own"
            allowed = f"this ticket's network is {what}: load it with trust_code=True"
            raise Untrusted("network.name", spec["name"], allowed)
        return build_network(
            Network(spec["name"], spec["options"]),
            in_channels=spec["in_channels"],
            num_classes=spec["num_classes"],
            seed=seed,
        )

    def _shrunk(self, dense: nn.Module) -> nn.Module:
        spec = self.manifest["network"]
        size, device = spec["image_size"], next(dense.parameters()).device
        example = torch.zeros(1, spec["in_channels"], size, size, device=device)
        try:
            groups = channel_groups(dense, example)
        except UnsupportedNetwork as error:
            raise DamagedTicket(f"{self.path}: {spec['name']}: {error}") from error
        expected = [(group.name, group.width) for group in groups]
        found = [(group["name"], len(group["mask"])) for group in self.manifest["groups"]]
        if found != expected:
            raise DamagedTicket(f"{self.path}: its channel groups are not those of {spec['name']}")
        return shrink(dense, groups, self.mask)


@contextlib.contextmanager
def _unallocated(most: int) -> Iterator[None]:
    """Networks built here by this thread have no weights, only their shapes.

    Raises DamagedTicket where one registers more than `most` parameters, or has more than
    `_MOST_WEIGHTS` elements in them: memory that nothing was written to has not been taken yet.
    """
    thread, count, elements = threading.get_ident(), 0, 0

    def forget(module: nn.Module, name: str, weight: nn.Parameter | None) -> Any:  # noqa: ARG001
        nonlocal count, elements
        if weight is None or threading.get_ident() != thread:
            return None
        count, elements = count + 1, elements + weight.numel()
        if count > most or elements > _MOST_WEIGHTS:
            raise DamagedTicket("the network is far larger than its weights")
        return nn.Parameter(weight.detach().to("meta"), weight.requires_grad)

    hook = register_module_parameter_registration_hook(forget)
    try:
        yield
    finally:
        hook.remove()


def group_masks(
    groups: Sequence[ChannelGroup], mask: Tensor, chosen: Tensor
) -> list[dict[str, str]]:
    """The manifest's `groups`: the ticket's mask and the one that the cut gave.

    Both are bool [channels over all groups].
    """
    widths = [group.width for group in groups]
    return [
        {"name": group.name, "mask": to_text(part), "cut": to_text(before)}
        for group, part, before in zip(
            groups, mask.split(widths), chosen.split(widths), strict=True
        )
    ]


def kept_channels(manifest: Mapping[str, Any]) -> dict[str, list[int]]:
    """How many channels each group keeps, and of how many: [kept, width] by name."""
    return {
        group["name"]: [group["mask"].count("1"), len(group["mask"])]
        for group in manifest["groups"]
    }


@functools.cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a ticket's bits depend on."""
    packages = ("raytickets", "numpy", "ray", "safetensors", "torch", "torch-pruning")
    return {name: version(name) for name in packages}


def save_ticket(folder: Path, network: nn.Module, manifest: Mapping[str, Any]) -> Ticket:
    """Write a ticket to `folder/<id>/`, whole or not at all.

    `manifest` is everything but `schema`, `id` and `files`. The id is a checksum over the manifest
    and so over the weights: the same ticket has the same id wherever it is found. Raises ValueError
    for a manifest that `load_ticket` would refuse.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        # A copy: a module that has two names has its weights under both.
        weights = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in network.state_dict().items()
        }
        # Its own writing to a file raises no OSError where the disk is full.
        (scratch / WEIGHTS).write_bytes(safetensors.torch.save(weights))
        complete = {
            "schema": SCHEMA,
            **manifest,
            "files": {WEIGHTS: _sha256(scratch / WEIGHTS)},
        }
        complete = {"id": _id(complete), **complete}
        text = json.dumps(complete, indent=1) + "\n"
        parse(text.encode())
        (scratch / MANIFEST).write_text(text, encoding="utf-8")
        for path in (scratch / WEIGHTS, scratch / MANIFEST, scratch):
            sync(path)
        scratch.chmod(0o755)
        target = folder / complete["id"]
        if not target.exists() or not is_whole(target):
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
            sync(folder)
        storage.keep(target)
        return Ticket(target, complete)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left; what is young may be another's at work."""
    for path in folder.glob(".writing-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _DAY:
                shutil.rmtree(path)


def save_retrained(
    folder: Path, source: Path, network: nn.Module, event: Mapping[str, Any]
) -> Ticket:
    """Write the ticket at `source` again, with the weights that it was retrained to.

    `event` is the journal's `retrained`. The network is moved to the CPU.
    """
    manifest = dict(load_ticket(source).manifest)
    for name in ("id", "schema", "files"):
        del manifest[name]
    told = ("epochs", "num_workers", "validation_accuracy", "test_accuracy")
    manifest["retrained"] = {"from": event["run"], **{name: event[name] for name in told}}
    return save_ticket(folder, network.cpu(), manifest)


def has_lost(sweep: Path, told: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the retrained ticket that these events of a retraining end with is not whole."""
    path = told[-1].get("path") if told else None
    return path is not None and not is_whole(sweep / path)


def load_ticket(path: str | Path, *, trust_code: bool = False) -> Ticket:
    """Open the ticket in a folder, or at an address, and verify its fields and checksums.

    It may come from a stranger: only its two files are read, after their sizes and kinds are known
    to be right, and nothing in them is run. `trust_code` allows a network that is the user's
    own function, or timm's with options. Raises DamagedTicket if anything is missing, altered or
    beyond what a ticket holds, OSError if an address cannot be reached.
    """
    path = storage.fetch(storage.local(path), largest={MANIFEST: LARGEST, WEIGHTS: _MOST_BYTES})
    try:
        names = {entry.name for entry in path.iterdir()}
        if others := {name for name in names if name[0] != "."} - {MANIFEST, WEIGHTS}:
            raise ValueError(f"it holds {min(others)!a}, which is none of a ticket's files")
        with _opened(path / MANIFEST) as file:
            manifest = parse(file.read(LARGEST + 1))
        claimed = {name: value for name, value in manifest.items() if name != "id"}
        if manifest["id"] != _id(claimed):
            raise ValueError("the manifest was altered after it was written")
        with _opened(path / WEIGHTS) as file:
            _check_header(file)
        with safetensors.safe_open(path / WEIGHTS, framework="pt"):
            pass  # It refuses offsets that overlap, leave holes or leave the file.
        if manifest["files"] != {WEIGHTS: _sha256(path / WEIGHTS)}:
            raise ValueError(f"{WEIGHTS} does not match its checksum")
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise DamagedTicket(f"{path}: not a whole ticket ({error})") from error
    return Ticket(path, manifest, trust_code)


def is_whole(path: Path) -> bool:
    """Whether a ticket is there that `load_ticket` verifies."""
    try:
        load_ticket(path)
    except DamagedTicket:
        return False
    return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A plain file: no link, which leads elsewhere, and no pipe, which nobody may write to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path.name} is not a file")
        yield file


def _check_header(file: BinaryIO) -> None:
    """Refuse weights whose header takes more memory, or which take more time, than a ticket's."""
    header = int.from_bytes(file.read(8), "little")
    if not 0 < header <= LARGEST:
        raise ValueError(f"{WEIGHTS} is not one of safetensors")
    if os.fstat(file.fileno()).st_size > _MOST_BYTES:
        raise ValueError(f"{WEIGHTS} is larger than any network's")


def _id(manifest: Mapping[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
