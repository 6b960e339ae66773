"""What was written to the journal is there after a crash; half a line is not; damage is seen."""

import errno
import json
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import made_up_sweep
import pytest
from made_up_sweep import LARGE, LOW, check, epoch, proof, retrained, ticket

from raytickets import journal as journal_module
from raytickets import storage
from raytickets.journal import DamagedJournal, Journal, mend_journal, read_journal
from raytickets.lease import Lost

EVENTS = [check(LOW, number / 2, {"0.3": None}) for number in (1, 2, 3)]


def test_events_come_back_in_order(tmp_path: Path):
    journal = Journal(tmp_path)
    for event in EVENTS:
        assert journal.append(event)
    journal.close()
    assert Journal(tmp_path).append({"event": "end"})
    assert read_journal(tmp_path) == [*EVENTS, {"event": "end"}]


def test_an_event_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch):
    synced: list[bytes] = []

    def fsync(_: int) -> None:
        synced.append((tmp_path / "journal.jsonl").read_bytes())

    journal = Journal(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    journal.append(EVENTS[0])
    assert synced[-1].endswith(b"\n")
    assert read_journal(tmp_path) == EVENTS[:1]


def test_lines_are_json_whose_last_field_is_the_checksum(tmp_path: Path):
    made_up_sweep.write(tmp_path, made_up_sweep.FINISHED)
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    assert [list(value)[-1] for value in values] == ["crc32"] * len(lines)
    assert [json.dumps(value) for value in values] == lines
    if jq := shutil.which("jq"):
        asked = [jq, "-r", ".event", tmp_path / "journal.jsonl"]
        kinds = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        assert kinds == [event["event"] for event in made_up_sweep.FINISHED]


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(tmp_path: Path):
    path = made_up_sweep.write(tmp_path, EVENTS) / "journal.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for size in range(second, len(whole)):
        path.write_bytes(whole[:size])
        assert read_journal(tmp_path) == EVENTS[:2]
        assert mend_journal(tmp_path) is None
        assert path.read_bytes() == whole[:second]
    path.write_bytes(whole[:-1])
    journal = Journal(tmp_path)
    assert journal.append(EVENTS[2])
    assert path.read_bytes() == whole


def test_every_changed_byte_is_found_and_cut_off_with_what_follows(tmp_path: Path):
    path = made_up_sweep.write(tmp_path, made_up_sweep.FINISHED) / "journal.jsonl"
    whole, chance = path.read_bytes(), random.Random(0)
    for place in [*chance.sample(range(len(whole)), 100), len(whole) - 1]:
        changed = bytearray(whole)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        line = whole.count(b"\n", 0, place) + 1
        with pytest.raises(DamagedJournal, match=f"line {line} is damaged"):
            read_journal(tmp_path)
        with pytest.raises(DamagedJournal):
            Journal(tmp_path)
        assert f"line {line} of {path} is damaged" in str(mend_journal(tmp_path))
        assert read_journal(tmp_path) == made_up_sweep.FINISHED[: line - 1]
    copies = sorted(tmp_path.glob("journal.damaged-*.jsonl"))
    assert len(copies) == 101
    assert (tmp_path / "journal.damaged-101.jsonl").read_bytes() == bytes(changed)


def test_a_mended_journal_is_whole_and_goes_on(tmp_path: Path):
    path = made_up_sweep.write(tmp_path, EVENTS) / "journal.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"check": 2', b'"check": 7'))
    said = mend_journal(tmp_path)
    assert said is not None
    assert "line 2" in said
    assert "2 lines" in said
    assert "journal.damaged-1.jsonl" in said
    assert mend_journal(tmp_path) is None
    journal = Journal(tmp_path)
    assert [journal.append(event) for event in EVENTS] == [False, True, True]
    assert path.read_bytes() == content


def test_a_line_without_a_checksum_is_damaged(tmp_path: Path):
    (tmp_path / "journal.jsonl").write_text('{"event": "end"}\n')
    with pytest.raises(DamagedJournal, match="line 1"):
        read_journal(tmp_path)


def test_what_is_told_again_is_not_written_again(tmp_path: Path):
    told = [EVENTS[0], ticket(LOW, LARGE, 0.3, 10, 0.9), proof(LARGE, 2, 0.9), epoch("dense", 1)]
    for _ in range(2):  # Also by another driver.
        journal = Journal(tmp_path)
        for event in told:
            journal.append(event)
            assert not journal.append(event | {"seconds": 3.0})
        journal.close()
    assert read_journal(tmp_path) == told
    others = [
        check(LOW, 1.0, {}),
        check(made_up_sweep.HIGH, 0.5, {}),
        ticket(made_up_sweep.HIGH, LARGE, 0.3, 10, 0.9),
        proof(LARGE, 3, 0.9),
        epoch("dense", 2),
        epoch(LARGE, 1),
        {"event": "end"},
        {"event": "end"},
    ]
    journal = Journal(tmp_path)
    assert all(journal.append(event) for event in others)


def test_what_is_retrained_once_more_tells_its_epochs_again(tmp_path: Path):
    journal = Journal(tmp_path)
    for event in (epoch(LARGE, 1), epoch("dense", 1), retrained(LARGE, 10, 10, 0.9)):
        journal.append(event)
    for again in (journal, Journal(tmp_path)):
        assert not again.append(epoch("dense", 1))
    again = Journal(tmp_path)
    assert again.append(epoch(LARGE, 1))
    assert not again.append(epoch(LARGE, 1))


def test_what_begins_anew_or_with_another_recipe_is_told(tmp_path: Path):
    journal = Journal(tmp_path)
    first = epoch(LARGE, 1) | {"identity": "100 epochs"}
    for event in (EVENTS[0], first):
        assert journal.append(event)
        assert not journal.append(event)
    assert journal.append(first | {"identity": "10 epochs"})
    retry = {"event": "retry", "trajectory": LOW, "attempt": 1, "reason": "other versions"}
    journal.append(retry)
    assert not journal.append(EVENTS[0])
    journal.append(retry | {"anew": True})
    assert Journal(tmp_path).append(EVENTS[0])
    assert not Journal(tmp_path).append(EVENTS[0])


@pytest.mark.parametrize(
    ("who", "event"),
    [
        ("run", {"event": "epoch", "run": "one", "epoch": 1}),
        ("trajectory", {"event": "ticket", "trajectory": "one", "ticket": "a"}),
    ],
)
def test_what_began_anew_is_told_again(tmp_path: Path, who, event):
    journal, other = Journal(tmp_path), event | {who: "other"}
    assert journal.append(event)
    assert journal.append(other)
    journal.append({"event": "retry", who: "one", "attempt": 1, "reason": "", "anew": True})
    assert journal.append(event)
    assert not journal.append(other)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_disk_that_is_full_is_named_and_leaves_the_journal_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
):
    journal = Journal(tmp_path)
    journal.append(EVENTS[0])
    file = journal._file
    left = room

    class Full:
        def write(self, line: bytes) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = file.write(line[:left])
            left -= written
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    monkeypatch.setattr(journal, "_file", Full())
    with pytest.raises(OSError, match=str(tmp_path / "journal.jsonl")) as caught:
        journal.append(EVENTS[1])
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "journal.jsonl").read_bytes().endswith(b"\n")
    monkeypatch.setattr(journal, "_file", file)
    assert journal.append(EVENTS[1])
    assert read_journal(tmp_path) == EVENTS[:2]


def test_what_is_appended_after_an_interruption_takes_the_place_of_the_line_that_it_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    journal = Journal(tmp_path)
    journal.append(EVENTS[0])

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            journal.append(EVENTS[1])
    journal.append({"event": "end"})  # a shorter line
    assert read_journal(tmp_path) == [EVENTS[0], {"event": "end"}]


def test_a_journal_at_an_address_is_uploaded_now_and_then_and_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept: list[int] = []
    broken = iter([False, False, True])
    appended = threading.Event()

    def keep(path: Path) -> None:
        if next(broken, False):
            kept.append(-1)
            raise OSError("the store does not answer")
        lines = path.read_bytes().count(b"\n")
        assert appended.wait(60)
        kept.append(lines)

    def wait_for(*expected: int) -> None:
        until = time.monotonic() + 10
        while kept != [*expected]:
            assert time.monotonic() < until, kept
            time.sleep(0.01)

    monkeypatch.setattr(storage, "address", lambda path: f"s3://bucket/{path.name}")
    monkeypatch.setattr(storage, "keep", keep)
    monkeypatch.setattr(journal_module, "KEEP_S", 0.05)
    journal = Journal(tmp_path)
    assert journal.append(EVENTS[0])
    time.sleep(0.1)  # It is being uploaded.
    assert journal.append(EVENTS[1])
    appended.set()
    wait_for(1, 2)
    journal.append(EVENTS[2])
    wait_for(1, 2, -1, 3)
    journal.close()
    assert kept == [1, 2, -1, 3, 3]


def test_a_value_that_json_cannot_hold_is_refused(tmp_path: Path):
    journal = Journal(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        journal.append({"event": "epoch", "run": "dense", "epoch": 1, "loss": float("nan")})
    assert read_journal(tmp_path) == []


def test_a_folder_without_a_journal(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_journal(tmp_path)
    assert mend_journal(tmp_path) is None


def test_a_journal_is_not_uploaded_once_its_lease_may_be_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uploads: list[Path] = []
    monkeypatch.setattr(storage, "address", lambda path: f"s3://bucket/{path.name}")
    monkeypatch.setattr(storage, "keep", uploads.append)
    monkeypatch.setattr(journal_module, "KEEP_S", 0.01)

    def confirm() -> None:
        raise Lost("nightly", "another process has taken it")

    journal = Journal(tmp_path, confirm)
    journal.append({"event": "end"})
    time.sleep(0.1)
    with pytest.raises(Lost):
        journal.close()
    assert not uploads
