"""What was written to the journal is there after a crash, and half a line is not."""

import pytest

from raytickets.journal import Journal, read_journal


def test_events_come_back_in_order(tmp_path):
    journal = Journal(tmp_path)
    for place in range(3):
        journal.append({"event": "check", "check": place})
    journal.close()
    again = Journal(tmp_path)
    again.append({"event": "end"})
    assert [event.get("check") for event in read_journal(tmp_path)] == [0, 1, 2, None]


def test_an_event_is_on_disk_before_append_returns(tmp_path):
    Journal(tmp_path).append({"event": "check"})
    assert read_journal(tmp_path) == [{"event": "check"}]


def test_a_torn_last_line_is_dropped(tmp_path):
    Journal(tmp_path).append({"event": "check"})
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"event": "tic')
    assert read_journal(tmp_path) == [{"event": "check"}]
    Journal(tmp_path).append({"event": "end"})
    assert [event["event"] for event in read_journal(tmp_path)] == ["check", "end"]


def test_a_value_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Journal(tmp_path).append({"loss": float("nan")})


def test_a_folder_without_a_journal(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_journal(tmp_path)
