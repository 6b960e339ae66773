"""The journal of a sweep or a comparison: every result, one JSON object a line, on disk before
anyone is told. The last field of a line, `crc32`, is the checksum of what stands before it.

Events, by their `event` field (`run` is a trajectory, a ticket, or `dense`):

sweep        name, started (UTC), series (the scheduled one that it is of, if any), space (all
             fields), fingerprint, channels, dense {macs, params}, data {fingerprint, train,
             validation, test}, versions {package: version}
comparison   in place of `sweep`: the same, and penalty, prune_ratios, seeds, methods, as resolved
check        trajectory, check, epoch (a fraction within one), loss since the last check,
             validation_accuracy (null within an epoch), distances {ratio: distance or null while
             the window fills; none in the rounds of `iterative`}, about_to_draw (a distance is
             near the limit), train_macs and seconds since the trajectory began
ticket       trajectory, ticket, path (relative to the sweep), penalty, prune_ratio, learning_rate,
             seed, method, rule, draw_check, draw_epoch, mask_distance, macs, params,
             kept {group: [kept, of]}; rule to mask_distance are null where nothing is drawn, and
             learning_rate where nothing is trained. In sweeps also proof_accuracy (validation) and
             proof_macs (training), both of the first rung; in comparisons search: the ledger of
             the search that this ticket alone would have needed
trajectory   trajectory, method, penalty, seed, changes {field: value} that Optuna chose, state
             (drawn, not converged, hopeless, diverged or failed), reason, epochs, train_macs,
             seconds, ratios {ratio: drawn, or the state}, distances_matrix {epochs, ratios {ratio:
             rows}} between the masks of every two checks. In comparisons it is of a source
proof        ticket, rung (from 2), proof_accuracy, proof_macs, seconds
winners      tickets, in order of falling proof accuracy in the last rung
epoch        run, epoch, loss, validation_accuracy, learning_rate; in sweeps also num_workers and
             identity (a hash of the recipe and the rest of the space)
retrained    run, path, macs, params, epochs, validation_accuracy, test_accuracy, train_macs,
             seconds, num_workers; in sweeps also recipe (the fields of Retraining), best_epoch and
             best_validation_accuracy (the accuracies before are of the last epoch's network); in
             comparisons also ledger, latency_ms (median of one image) and relative_latency (to the
             dense network)
retry        trajectory or run, attempt (from 1), reason: it is run again, as a worker was lost, or
             goes on from an older checkpoint; with anew (true) from none, as what it was made by,
             such as the versions of libraries, is not the same any more
stopped      run, reason: its retraining outside of a sweep was interrupted or has failed
end          state (done, failed or interrupted), reason

MACs are of one image forward (`macs`) or of training (3 x forward x samples); accuracies are
shares between 0 and 1; seconds are wall time. A ledger is {forward_macs, backward_macs, samples,
seconds, joules, energy}, as in `raytickets.cost.Ledger`.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

from raytickets import storage
from raytickets.lease import Lost

Event = dict[str, Any]

NAME = "journal.jsonl"
KEEP_S = 30.0
"""How often the journal of a sweep at an address is uploaded."""

_MARK = b', "crc32": "'
_KEYS = {
    "check": ("trajectory", "check"),
    "ticket": ("trajectory", "ticket"),
    "proof": ("ticket", "rung"),
    "epoch": ("run", "epoch", "identity"),
}
"""The fields that tell an event from the others of its kind, where it may be told again."""


class DamagedJournal(ValueError):
    """A line of a journal is not what was written."""


class Journal:
    """Appends events to `journal.jsonl` in a sweep's folder, each one synced to disk.

    Where the folder is a local copy of an address, the journal is uploaded every `KEEP_S` seconds
    and when it is closed; each time `confirm` is called before, and what it raises as Lost ends it.
    Raises DamagedJournal as `read_journal` does, and OSError.
    """

    def __init__(self, sweep: Path, confirm: Callable[[], None] = lambda: None):
        self._confirm = confirm
        self.path = storage.fetch(sweep / NAME)
        self.path.touch()
        events, self._size = _whole(self.path)
        self._file = self.path.open("r+b", buffering=0)
        self._file.truncate(self._size)
        storage.sync(sweep)
        self._keys: set[tuple] = set()
        for event in events:
            self._remember(event)
        self._away = storage.address(self.path) != str(self.path)
        self._closing, self._uploading = threading.Event(), threading.Lock()
        if self._away:
            threading.Thread(target=self._keep, name="journal", daemon=True).start()

    def append(self, event: Event) -> bool:
        """Write an event; False, and nothing written, if it is there already.

        It is there if another one has its trajectory and check, trajectory and ticket, ticket and
        rung, or run, epoch and identity, unless the run was retrained, or either begun anew, since.
        Other events are always written. Raises OSError if the disk does not take it; the journal
        is as it was then.
        """
        if _key(event) in self._keys:
            return False
        line = _line(event)
        try:
            # An interruption may have left a line here that was never told to anyone.
            self._file.truncate(self._size)
            self._file.seek(self._size)
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._size)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._size += len(line)
        self._remember(event)
        return True

    def close(self) -> None:
        """Raises OSError or Lost if the last upload fails."""
        self._closing.set()
        self._file.close()
        if self._away:
            with self._uploading:
                self._confirm()
                storage.keep(self.path)

    def _remember(self, event: Event) -> None:
        if key := _key(event):
            self._keys.add(key)
        elif event["event"] == "retrained":
            self._forget("epoch", event["run"])
        elif event["event"] == "retry" and event.get("anew"):
            for kind in ("epoch", "check", "ticket"):
                self._forget(kind, event.get("trajectory") or event["run"])

    def _forget(self, *start: str) -> None:
        self._keys = {key for key in self._keys if key[:2] != start}

    def _keep(self) -> None:
        kept = 0
        while not self._closing.wait(KEEP_S):
            if kept < (size := self._size):
                try:
                    with self._uploading:
                        self._confirm()
                        storage.keep(self.path)
                    kept = size
                except OSError:
                    continue  # The next one may succeed, and the last one tells.
                except Lost:
                    return  # The next event tells.


def read_journal(sweep: Path) -> list[Event]:
    """Every whole event of a sweep, oldest first.

    Raises FileNotFoundError if the folder holds no journal, DamagedJournal on a damaged line.
    """
    return _whole(storage.fetch(sweep / NAME))[0]


def mend_journal(sweep: Path) -> str | None:
    """Cut the journal before its first damaged line; a sentence that says so, None if all is well.

    What it was is kept beside it as `journal.damaged-<n>.jsonl`. Half a last line, which a writer
    that was killed may have left, was never told to anyone and goes without a word. Of an address
    the journal there is taken first, if another machine has gone on with it. Raises OSError.
    """
    path = storage.fetch_journal(sweep / NAME)
    if not path.exists():
        return None
    content = path.read_bytes()
    events, size, damaged = _parse(content)
    said = None
    if damaged:
        names = {entry.name for entry in sweep.iterdir()} | set(storage.names(sweep))
        number = sum(name.startswith("journal.damaged-") for name in names) + 1
        copy = sweep / f"journal.damaged-{number}.jsonl"
        shutil.copyfile(path, copy)
        storage.sync(copy)
        storage.keep(copy)
        lines = content.count(b"\n", size)
        said = (
            f"line {len(events) + 1} of {storage.address(path)} is damaged: it goes on from the "
            f"line before; the {lines} lines from there on are kept in {copy.name}"
        )
    if size < len(content):
        os.truncate(path, size)
        storage.sync(path)
        storage.sync(sweep)
        storage.keep(path)
    return said


def _whole(path: Path) -> tuple[list[Event], int]:
    """The events and the bytes that they take, without half a last line."""
    events, size, damaged = _parse(path.read_bytes())
    if damaged:
        raise DamagedJournal(f"line {len(events) + 1} is damaged")
    return events, size


def _parse(content: bytes) -> tuple[list[Event], int, bool]:
    """The events before the first damaged line, the bytes they take, and whether there is one."""
    events, start = [], 0
    while (end := content.find(b"\n", start)) >= 0:
        event = _event(content[start:end])
        if event is None:
            return events, start, True
        events.append(event)
        start = end + 1
    # A whole line and another byte than its line break are no torn line.
    return events, start, _event(content[start:-1]) is not None


def _line(event: Event) -> bytes:
    body = json.dumps(event, allow_nan=False).encode()[:-1]
    return body + _MARK + f'{crc32(body):08x}"}}\n'.encode()


def _event(line: bytes) -> Event | None:
    """What `_line` wrote, None if it is damaged."""
    body, mark, checksum = line.rpartition(_MARK)
    if not mark or checksum != f'{crc32(body):08x}"}}'.encode():
        return None
    return json.loads(body + b"}")


def _key(event: Event) -> tuple | None:
    fields = _KEYS.get(event["event"])
    return fields and (event["event"], *(event.get(field) for field in fields))
