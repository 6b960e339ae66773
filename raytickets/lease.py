"""Who may write in a sweep's folder: one process at a time, told apart by a number that grows."""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from raytickets import storage

FILE = "lease.json"
"""In the sweep's folder; it names the last holder, who holds the lease only while it is locked."""
NAMED_S = 0.1
"""How long a holder may take from the lock to its name in the file."""
LIFE_S, RENEW_S = 120.0, 20.0
"""At an address: how long a lease lasts, and how often it is renewed."""
MARGIN_S = 40.0
"""A holder stops so long before its lease ends: what it wrote is uploaded within that time."""
SKEW_S = 15.0
"""How far the clocks of two machines may be apart."""


@dataclass(frozen=True)
class Holder:
    host: str
    pid: int
    since: str
    """Local time with its offset, as ISO 8601 has it."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@dataclass(frozen=True)
class Lease:
    holder: Holder
    token: int
    """Larger than that of every earlier holding."""
    confirm: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)
    """To be called before anything is written: raises Lost if the lease may be another's."""


class Held(Exception):
    """Another process holds the lease; `holder` is None if it has not said who it is."""

    def __init__(self, name: str, holder: Holder | None):
        super().__init__(f"{name} is held by {holder or 'another process'}")
        self.holder = holder


class Lost(Held):
    """The lease ran out, because it could not be renewed, or another process took it."""

    def __init__(self, name: str, reason: str):
        Exception.__init__(self, f"the lease of {name} was lost: {reason}")
        self.holder = None


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Lease]:
    """Hold the folder's lease, the folder made if there is none; Held if another process does.

    It is a lock of the file system on a plain path, so that a killed holder's is free at once. At
    an address it is a file that is replaced if nobody else did, every `RENEW_S`; a killed holder's
    is free after `LIFE_S`, on its own host at once. Raises OSError if the store does not answer.
    """
    if storage.address(folder) != str(folder):
        with _leased(folder / FILE) as lease:
            yield lease
        return
    with _locked(folder) as file:
        lease = _next(file.read())
        file.seek(0)
        file.write(_text(lease))
        file.truncate()
        file.flush()

        def confirm() -> None:
            # A client that is cut off from NFS loses its lock, and hears nothing of it.
            path = folder / FILE
            if not path.exists():
                raise Lost(folder.name, "its folder is gone")
            if _parsed(path.read_text(encoding="utf-8")) != lease:
                raise Lost(folder.name, "another process has taken it")

        yield dataclasses.replace(lease, confirm=confirm)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    path = folder / FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(NAMED_S)
                before = _parsed(file.read())
                raise Held(folder.name, before and before.holder) from None
            # What was refused removes its new folder: this may be the file of one that is gone.
            if _is_at(file, path):
                yield file
                return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _leased(path: Path) -> Iterator[Lease]:
    there = storage.read(path)
    text, version = (there[0].decode(), there[1]) if there else ("", None)
    before, name = _parsed(text), path.parent.name
    if before:
        found, _ = json.JSONDecoder().raw_decode(text)
        # That of a folder, copied to the address, has no end.
        lasts = time.time() < found.get("until", 0) + SKEW_S
        if lasts and not _is_gone(before.holder, found.get("process")):
            raise Held(name, before.holder)
    renewal = _Renewal(path, _next(text), version)
    try:
        renewal.put(LIFE_S)
    except storage.Changed:
        there = storage.read(path)
        taken = _parsed(there[0].decode()) if there else None
        raise Held(name, taken and taken.holder) from None
    thread = threading.Thread(target=renewal.run, name="lease", daemon=True)
    thread.start()
    try:
        yield dataclasses.replace(renewal.lease, confirm=renewal.confirm)
    finally:
        renewal.ended.set()
        thread.join(RENEW_S)
        if renewal.taken is None and not thread.is_alive():
            with contextlib.suppress(OSError, storage.Changed):  # Then it runs out by itself.
                renewal.put(-SKEW_S)


def _process(pid: int | str = "self") -> list[str] | None:
    """The boot, the pid namespace and the start of a process, as pids are used again.

    None where /proc does not tell, or is that of another namespace.
    """
    try:
        if str(Path("/proc/self").readlink()) != str(os.getpid()):
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        start = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19]
        return [boot, str(Path("/proc/self/ns/pid").readlink()), start.decode()]
    except OSError:
        return None


def _is_gone(holder: Holder, process: list[str] | None) -> bool:
    """Whether it is known that this process has ended: only where its pid means the same."""
    here = _process()
    if not (process and here) or process[:2] != here[:2] or holder.host != socket.gethostname():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # It is another user's.
    now = _process(holder.pid)
    return now is not None and now != process


def _now() -> float:
    """Seconds, those included in which the machine was suspended, where it counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class _Renewal:
    """Keeps a lease at an address alive."""

    def __init__(self, path: Path, lease: Lease, version: str | None):
        self._path, self.lease, self._version = path, lease, version
        self._renewed = _now()
        self.taken: str | None = None
        """Why it cannot be renewed any more."""
        self.ended = threading.Event()

    def put(self, life_s: float) -> None:
        started = _now()
        # Every content is another one, so that the store can tell a lost answer from a lost race.
        more = {"until": time.time() + life_s, "nonce": uuid.uuid4().hex, "process": _process()}
        content = _text(self.lease, **more).encode()
        self._version = storage.put_if(self._path, content, self._version)
        self._renewed = started

    def run(self) -> None:
        while not self.ended.wait(RENEW_S) and self.taken is None:
            try:
                self.put(LIFE_S)
            except storage.Changed:
                self.taken = "another process has taken it"
            except OSError:
                continue  # `confirm` knows for how long.

    def confirm(self) -> None:
        reason = self.taken
        if reason is None and _now() - self._renewed > LIFE_S - MARGIN_S:
            reason = f"it could not be renewed for {LIFE_S - MARGIN_S:.0f} s"
        if reason:
            raise Lost(self._path.parent.name, reason)


def _text(lease: Lease, **more: object) -> str:
    return json.dumps({"holder": vars(lease.holder), "token": lease.token} | more)


def _next(before: str) -> Lease:
    """The lease after the one that this text of the file tells of."""
    earlier = _parsed(before)
    since = datetime.now(UTC).astimezone().isoformat(timespec="seconds")
    holder = Holder(socket.gethostname(), os.getpid(), since)
    return Lease(holder, earlier.token + 1 if earlier else 1)


def _parsed(text: str) -> Lease | None:
    """None for a file that is new, or that a lost machine left damaged."""
    try:
        # A writer that was killed may have left the end of a longer text.
        found, _ = json.JSONDecoder().raw_decode(text)
        return Lease(Holder(**found["holder"]), found["token"])
    except (ValueError, KeyError, TypeError):
        return None
