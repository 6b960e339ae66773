"""Checkpoints: generations of a state on disk, tensors and JSON in one safetensors file each.

A generation is `<number>-<first 16 hexadecimal digits of its SHA-256>.safetensors`, with the JSON
in the file's metadata. A file that is not what its name says is never parsed.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from raytickets import storage

FORMAT = 4
"""Of what training keeps in them, for what goes on from them to compare."""
INTERVAL_S = 60.0
"""Between checkpoints within an epoch; spot machines are taken two minutes after their notice."""

_WRITING, _HOUR = ".writing-", 3600.0

_NAME = re.compile(r"\d{8}-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """One generation, as it was saved."""

    number: int
    tensors: Mapping[str, Tensor]
    """On the CPU."""
    state: Mapping[str, Any]
    damaged: tuple[str, ...]
    """The names of newer ones that were not whole, newest first."""


def save(
    folder: Path,
    number: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 2,
) -> None:
    """Write a generation, whole or not at all; it is the newest from then on.

    Of the others the `keep` - 1 newest with smaller numbers stay. The tensors may be on any device
    and must not share memory; `state` is JSON without NaN. Raises OSError if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(whole, {"state": json.dumps(state, allow_nan=False)})
    name = f"{number:08d}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    scratch = folder / f"{_WRITING}{os.getpid()}-{name}"
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(folder / name)
    finally:
        scratch.unlink(missing_ok=True)
    storage.sync(folder)
    storage.keep(folder / name)
    others = storage.names(folder)
    older = [other for other in _newest_first(others) if _number(other) < number]
    for other in set(others) - {name, *older[: keep - 1]}:
        if keep == 1 or not _is_being_written(folder / other):
            storage.remove(folder / other)


def _is_being_written(path: Path) -> bool:
    """Whether it may be another's at work: of one whose machine was only cut off from the head."""
    if not path.name.startswith(_WRITING):
        return False
    try:
        return time.time() - path.stat().st_mtime < _HOUR
    except FileNotFoundError:
        return True


def generations(folder: Path) -> list[str]:
    """The names of all that are there, whole or not, newest first."""
    return _newest_first(storage.names(folder))


def load(folder: Path) -> Checkpoint | None:
    """The newest generation that is whole, if there is one."""
    damaged = []
    for name in generations(folder):
        path = storage.fetch(folder / name)
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == name[9:25]:
                # Checks all sizes against the content before it makes a tensor.
                tensors = safetensors.torch.load(content)
                header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
                state = json.loads(header["__metadata__"]["state"])
                return Checkpoint(_number(name), tensors, state, tuple(damaged))
        except (FileNotFoundError, ValueError, KeyError, safetensors.SafetensorError):
            pass
        damaged.append(name)
    return None


class Writer:
    """Saves the generations of one folder in a thread of its own, one at a time.

    It is a context manager, which waits at its end for the one that is being saved. What goes wrong
    in saving is raised by the next call.
    """

    def __init__(self, folder: Path, number: int = 0):
        """`number` is that of the generation to go on from."""
        self.folder, self._number = folder, number
        self._begun = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    @property
    def due(self) -> bool:
        """Whether the last one was begun `INTERVAL_S` ago."""
        return time.monotonic() - self._begun >= INTERVAL_S

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2) -> None:
        """Begin to save the next generation; nothing given may be changed afterwards."""
        self.wait()
        self._number += 1
        self._begun = time.monotonic()
        self._pending = self._thread.submit(save, self.folder, self._number, tensors, state, keep)

    def wait(self) -> None:
        """Until what was given to save is on disk."""
        if self._pending:
            self._pending.result()


def _newest_first(names: list[str]) -> list[str]:
    return sorted(filter(_NAME.fullmatch, names), reverse=True)


def _number(name: str) -> int:
    return int(name[:8])
