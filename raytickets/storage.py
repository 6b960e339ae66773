"""Where sweeps are kept: a folder, or an address that the folder is a local copy of."""

from pathlib import Path


def local(storage: str | Path) -> Path:
    """The folder to work in."""
    return Path(storage).expanduser().resolve()


def address(path: Path) -> str:
    """What a person is shown for a path in it."""
    return str(path)


def keep(path: Path) -> None:
    """Upload a file or folder that is whole on disk; nothing for a plain path."""


def fetch(path: Path) -> Path:
    """Download a file or folder that is not here; nothing for a plain path."""
    return path
