"""Tickets on disk: weights as safetensors, everything else as a JSON manifest, checksummed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from raytickets.config import InputError, Network
from raytickets.masks import from_text, to_text
from raytickets.models import build_network
from raytickets.shrink import ChannelGroup, channel_groups, shrink

SCHEMA = 1
WEIGHTS = "ticket.safetensors"
MANIFEST = "manifest.json"


class DamagedTicket(ValueError):
    """A ticket's files are missing, incomplete or not what its manifest says."""


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

        Raises InputError if the network is the user's own code and the ticket was loaded without
        `trust_code`, DamagedTicket if weights and mask do not fit the network.
        """
        network = self.fresh_network(seed=0)
        try:
            network.load_state_dict(safetensors.torch.load_file(self.path / WEIGHTS))
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise DamagedTicket(f"{self.path}: {error}") from error
        return network.eval()

    def fresh_network(self, seed: int) -> nn.Module:
        """The same shrunk shape with new weights drawn from the seed; errors as `network`."""
        spec = self.manifest["network"]
        if ":" in spec["name"] and not self.trust_code:
            allowed = "this ticket's network is code of its own: load it with trust_code=True"
            raise InputError("network.name", spec["name"], allowed)
        dense = build_network(
            Network(spec["name"], spec["options"]),
            in_channels=spec["in_channels"],
            num_classes=spec["num_classes"],
            seed=seed,
        )
        example = torch.zeros(1, spec["in_channels"], spec["image_size"], spec["image_size"])
        groups = channel_groups(dense, example)
        expected = [(group.name, group.width) for group in groups]
        found = [(group["name"], len(group["mask"])) for group in self.manifest["groups"]]
        if found != expected:
            raise DamagedTicket(f"{self.path}: its channel groups are not those of {spec['name']}")
        return shrink(dense, groups, self.mask)


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


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a ticket's bits depend on."""
    packages = ("raytickets", "numpy", "ray", "safetensors", "torch", "torch-pruning")
    return {name: version(name) for name in packages}


def save_ticket(folder: Path, network: nn.Module, manifest: Mapping[str, Any]) -> Ticket:
    """Write a ticket to `folder/<id>/`, whole or not at all.

    `manifest` is everything but `schema`, `id` and `files`. The id is a checksum over the manifest
    and so over the weights: the same ticket has the same id wherever it is found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        safetensors.torch.save_file(weights, scratch / WEIGHTS)
        complete = {
            "schema": SCHEMA,
            **manifest,
            "files": {WEIGHTS: _sha256(scratch / WEIGHTS)},
        }
        complete = {"id": _id(complete), **complete}
        (scratch / MANIFEST).write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")
        for path in (scratch / WEIGHTS, scratch / MANIFEST, scratch):
            _sync(path)
        scratch.chmod(0o755)
        target = folder / complete["id"]
        if target.exists():
            try:
                return load_ticket(target)
            except DamagedTicket:
                shutil.rmtree(target)
        scratch.rename(target)
        _sync(folder)
        return Ticket(target, complete)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def load_ticket(path: str | Path, *, trust_code: bool = False) -> Ticket:
    """Open the ticket in a folder and verify its checksums.

    `trust_code` allows a ticket whose network is the user's own function to import it. Raises
    DamagedTicket if anything is missing or altered.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise DamagedTicket(f"{path}: schema {manifest['schema']!r} is not {SCHEMA}")
        claimed = {name: value for name, value in manifest.items() if name != "id"}
        if manifest["id"] != _id(claimed):
            raise DamagedTicket(f"{path}: the manifest was altered after it was written")
        if manifest["files"] != {WEIGHTS: _sha256(path / WEIGHTS)}:
            raise DamagedTicket(f"{path}: {WEIGHTS} does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DamagedTicket):
            raise
        raise DamagedTicket(f"{path}: not a whole ticket ({error})") from error
    return Ticket(path, manifest, trust_code)


def _id(manifest: Mapping[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
