"""Where sweeps are kept: a folder, or an address in an object store and a local copy of it.

A path tells by itself whether it is such a copy, so every function here works on every node.
Credentials come from the environment as the store's own tools have it (AWS_*, GOOGLE_*, AZURE_*,
or the machine's role); AWS_ENDPOINT_URL names another store that speaks S3. What goes wrong there
is an OSError of one line, after the retries of a minute.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

from raytickets.config import InputError, expanded

STORES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
"""The schemes of addresses, <scheme>://<bucket or container>/<prefix>."""

LAST = "manifest.json"
"""The file that makes a folder whole: uploaded last, removed first."""

_COPIES = "raytickets/remote"
_RETRIES = {"max_retries": 10, "retry_timeout": timedelta(seconds=60)}
_CLIENT = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=60)}


class Changed(Exception):
    """The object has another version than the one to be replaced."""


def local(storage: str | Path) -> Path:
    """The folder to work in for a path, file:// or an address.

    That of an address is in `$RAYTICKETS_WORK/raytickets/remote`, else in `$XDG_CACHE_HOME` or
    `~/.cache` in its place. Raises InputError if the address cannot be used; one that holds
    credentials is refused and not shown.
    """
    # pathlib makes one slash of two.
    address = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", str(storage))
    if address is None:
        return expanded("storage", storage).resolve()
    scheme, rest = address.groups()
    if scheme == "file":
        return Path("/", rest).resolve()
    if "@" in rest or "?" in rest:
        allowed = "must hold no credentials and no options: they are taken from the environment"
        raise InputError("storage", f"{scheme}://...", allowed)
    if scheme not in STORES:
        schemes = ", ".join(f"{name}://" for name in STORES)
        raise InputError("storage", f"{scheme}://{rest}", f"must be a folder, or one of {schemes}")
    parts = rest.rstrip("/").split("/")
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*", part) for part in parts):
        allowed = "must be a bucket and names of letters, digits, '.', '-', '_' and '='"
        raise InputError("storage", f"{scheme}://{rest}", allowed)
    _store(scheme, parts[0])
    home = os.environ.get("RAYTICKETS_WORK") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(home).expanduser().resolve() / _COPIES / scheme / "/".join(parts)
    except RuntimeError as error:
        allowed = f"set RAYTICKETS_WORK to a folder for its local copy ({error})"
        raise InputError("storage", f"{scheme}://{rest}", allowed) from error


def address(path: Path) -> str:
    """What a person is shown: the address of a local copy, else the path."""
    place = _place(path)
    return str(path) if place is None else f"{place[0]}://{place[1]}/{place[2]}".rstrip("/")


def keep(path: Path) -> None:
    """Upload a file or folder that is whole on disk; nothing for a plain path.

    Of a folder, `manifest.json` is uploaded last: without it, it is not there for readers.
    """
    if _place(path) is None:
        return
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in sorted(files, key=lambda file: (file.name == LAST, file)):
        _ask(file, lambda obstore, store, key, file=file: obstore.put(store, key, file))


def fetch(path: Path, again: bool = False, largest: Mapping[str, int] | None = None) -> Path:
    """Download a file or a folder if it is not here, or `again`; nothing for a plain path.

    It comes whole or not at all. A folder without `manifest.json` is none. What is not in the
    store either is left to whoever opens it. `largest` names all that may come of a folder, and
    how many bytes each file may have: OSError if one has more.
    """
    if _place(path) is None or (path.exists() and not again):
        return path
    if largest or not _download(path, path):
        _download_folder(path, largest)
    return path


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fetch_journal(path: Path) -> Path:
    """Make a journal's local copy the newest: the longer one, where one goes on from the other.

    Where they differ, another machine has gone on since, and the store's replaces the copy.
    """
    found = None if _place(path) is None else read(path)
    if found is not None:
        here = path.read_bytes() if path.exists() else b""
        if not here.startswith(found[0]):
            _write(path, [found[0]])
    return path


def keep_database(path: Path) -> None:
    """Upload a file that is changed in place, so that `fetch_database` knows it; nothing for a
    plain path.
    """
    if _place(path) is not None:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        # Nobody knows whether an upload that is cut off has arrived.
        _write(_known(path), [f"{name}\n".encode() for name in (*_digests(path), digest)])
        _ask(path, lambda obstore, store, key: obstore.put(store, key, content))
        _write(_known(path), [f"{digest}\n".encode()])


def fetch_database(path: Path) -> Path:
    """Make the local copy of a file that is changed in place the newest; for its only writer.

    While the store has what was last uploaded or fetched here, by its SHA-256, nobody else has gone
    on with it, and the copy stays with all that was not uploaded. Else the store's replaces it.
    """
    found = None if _place(path) is None else read(path)
    if found is not None:
        digest = hashlib.sha256(found[0]).hexdigest()
        if not path.exists() or digest not in _digests(path):
            # SQLite would undo in the new file what a writer that was killed did to the old one.
            path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
            _write(path, [found[0]])
            _write(_known(path), [f"{digest}\n".encode()])
    return path


def _known(path: Path) -> Path:
    return path.with_name(f".{path.name}.known")


def _digests(path: Path) -> list[str]:
    known = _known(path)
    return known.read_text().split() if known.exists() else []


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one: its `manifest.json` first, then the rest."""
    if _place(path) is not None:
        inside = [path / name for name in _inside(path)]
        for file in sorted([path, *inside], key=lambda file: file.name != LAST):
            _ask(file, _delete)
    if path.is_dir():
        (path / LAST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def names(path: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no folder. Of an address: what is there."""
    if _place(path) is None:
        return sorted(child.name for child in path.iterdir()) if path.is_dir() else []
    found = _ask(path, lambda obstore, store, key: obstore.list_with_delimiter(store, key))
    paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
    return sorted(name.rsplit("/", 1)[-1] for name in paths)


def put_if(path: Path, content: bytes, version: str | None) -> str:
    """Replace that version of a local copy's object, or create it if None; the new version.

    Raises Changed if the object has another version, or is there already. Every writer's content
    must be its own: an upload whose answer was lost is told from another writer's by it. Nothing
    is written locally.
    """
    mode = "create" if version is None else json.loads(version)

    def put(obstore: Any, store: Any, key: str) -> str | None:
        refusals = (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError)
        try:
            return _version(obstore.put(store, key, content, mode=mode, use_multipart=False))
        except (*refusals, FileNotFoundError):
            return None

    if new := _ask(path, put):
        return new
    there = read(path)
    if there is None or there[0] != content:
        raise Changed(address(path))
    return there[1]


def read(path: Path) -> tuple[bytes, str] | None:
    """Content and version of a local copy's object as it is in the store; None if there is none."""

    def get(obstore: Any, store: Any, key: str) -> tuple[bytes, str] | None:
        try:
            found = obstore.get(store, key)
            return bytes(found.bytes()), _version(found.meta)
        except FileNotFoundError:
            return None

    return _ask(path, get)


def _version(meta: Any) -> str:
    """S3 and Azure tell versions by e_tag, Google by version."""
    return json.dumps({name: meta[name] for name in ("e_tag", "version") if meta[name]})


def _place(path: Path) -> tuple[str, str, str] | None:
    """Scheme, bucket and key of a local copy; None for a plain path."""
    schemes = "|".join(STORES)
    found = re.search(rf"/{_COPIES}/({schemes})/([^/]+)/?(.*)", path.absolute().as_posix())
    return found and (found[1], found[2], found[3])


def _ask(path: Path, question: Callable[[Any, Any, str], Any]) -> Any:
    """What is answered when obstore, the store and the key of a local copy are known.

    obstore would keep Ctrl-C waiting for the store: a thread waits in place of the caller.
    """
    place = _place(path)
    if place is None:
        raise ValueError(f"{path} is not the local copy of an address")
    store = _store(*place[:2])
    import obstore

    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(question(obstore, store, place[2]))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="storage", daemon=True).start()
    try:
        return answer.result()
    except (obstore.exceptions.BaseError, FileNotFoundError) as error:
        # The other lines are what was sent and answered, with the name of the access key.
        raise OSError(f"{address(path)}: {_first_line(error)}") from None


@functools.cache
def _store(scheme: str, bucket: str) -> Any:
    try:
        from obstore import exceptions, store
    except ImportError:
        allowed = "needs raytickets with its extra cluster"
        raise InputError("storage", f"{scheme}://{bucket}", allowed) from None
    # Who names an http:// endpoint has chosen it.
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    client = _CLIENT | {"allow_http": plain and scheme == "s3"}
    try:
        kind = getattr(store, STORES[scheme])
        return kind(bucket, client_options=client, retry_config=_RETRIES)
    except (exceptions.BaseError, ValueError) as error:
        raise InputError("storage", f"{scheme}://{bucket}", _first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _delete(obstore: Any, store: Any, key: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        obstore.delete(store, key)


def _inside(path: Path) -> list[str]:
    """The files of a folder in the store, relative to it."""
    found = _ask(path, lambda obstore, store, key: (key, obstore.list(store, key).collect()))
    return [entry["path"].removeprefix(f"{found[0]}/") for entry in found[1]]


def _download(path: Path, target: Path, most: float = math.inf) -> bool:
    """Whether there is such an object; OSError if it has over `most` bytes."""

    def get(obstore: Any, store: Any, key: str) -> bool:
        try:
            found = obstore.get(store, key)
        except FileNotFoundError:
            return False
        if found.meta["size"] > most:
            raise OSError(f"{address(path)} has over {most} bytes")
        _write(target, found)
        return True

    return _ask(path, get)


def _download_folder(path: Path, largest: Mapping[str, int] | None) -> None:
    sizes = largest or dict.fromkeys(_inside(path), math.inf)
    if LAST not in sizes:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as scratch:
        new = Path(scratch, "new")
        for name, most in sizes.items():
            if not _download(path / name, new / name, most):
                return  # Somebody has begun to remove it.
        if path.exists():
            path.rename(Path(scratch, "old"))
        try:
            new.rename(path)
        except OSError:
            if not path.exists():  # else another process was first
                raise


def _write(path: Path, chunks: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".fetching-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
