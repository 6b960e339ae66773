"""torchvision: its modules, imported in a fraction of the time, and CIFAR as it reads it."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np

from raytickets.config import Data, InputError, expanded


def torchvision(part: str) -> ModuleType:
    """The module `torchvision.<part>`."""
    # For a question that only its detection operators ask, torchvision imports torch._dynamo: 4 s.
    answer = SimpleNamespace(is_compile_supported=lambda device: False)  # noqa: ARG005
    lent = sys.modules.setdefault("torch._dynamo.utils", answer)  # type: ignore[arg-type]
    try:
        return importlib.import_module(f"torchvision.{part}")
    finally:
        if lent is answer:
            del sys.modules["torch._dynamo.utils"]


def read_cifar(data: Data, *, train: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The training or the test images of CIFAR-10 or CIFAR-100, and the names of their classes.

    Images are uint8 [N, 32, 32, 3], labels int64 [N]; those of CIFAR-100 are the fine ones. Raises
    InputError if the files are not there, or have not the checksums that torchvision knows.
    """
    name = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}[data.source]
    kind = getattr(torchvision("datasets"), name)
    root = expanded("data.path", data.path)
    try:
        found = kind(str(root), train=train, download=data.download)
    except Exception as error:  # A download fails in many ways, and a damaged archive in more.
        files = root / kind.base_folder
        if data.download:
            allowed = f"{name} cannot be fetched into {root}: {type(error).__name__}: {error}"
            raise InputError("data.download", True, allowed) from error
        state = "is damaged" if files.is_dir() else "is not there"
        allowed = f"{files} {state}; it is {kind.filename} unpacked, which download=True fetches"
        raise InputError("data.path", data.path, allowed) from error
    images = np.ascontiguousarray(found.data, np.uint8)
    return images, np.array(found.targets, np.int64), tuple(found.classes)
