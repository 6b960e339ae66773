"""What was saved comes back bit for bit, or the generation before it does."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytickets import checkpoint
from raytickets.checkpoint import Writer, generations, load, save

TENSORS = {
    "weights": torch.arange(6.0).view(2, 3),
    "low": torch.tensor([1.5, -2.0]).bfloat16(),
    "levels": torch.tensor([[1, 2], [3, 255]], dtype=torch.uint8),
    "counts": torch.tensor(7),
    "none": torch.zeros(0),
}
STATE = {"epoch": 3, "told": [[{"loss": 0.1, "text": 'é"'}]], "nothing": None}


def same(found, tensors=TENSORS, state=STATE):
    assert found.state == state
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    return True


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path / "deep" / "folder", 3, TENSORS, STATE)
    found = load(tmp_path / "deep" / "folder")
    assert (found.number, found.damaged) == (3, ())
    assert same(found)


def test_nothing_is_found_where_nothing_was_saved(tmp_path):
    assert load(tmp_path / "missing") is None
    (tmp_path / "other.txt").touch()
    assert load(tmp_path) is None


def test_two_generations_stay_and_a_name_tells_the_checksum(tmp_path):
    for number in range(1, 5):
        save(tmp_path, number, TENSORS, STATE | {"epoch": number})
    assert [name[:8] for name in generations(tmp_path)] == ["00000004", "00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == generations(tmp_path)[::-1]
    for name in generations(tmp_path):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()[:16] == name[9:25]
    save(tmp_path, 5, {}, STATE, keep=1)
    assert same(load(tmp_path), {}, STATE)
    assert len(list(tmp_path.iterdir())) == 1


def damaged(content, chance):
    """A truncation or a flipped bit."""
    if chance.random() < 0.5:
        return content[: chance.randrange(len(content))]
    place = chance.randrange(len(content))
    flipped = content[place] ^ (1 << chance.randrange(8))
    return content[:place] + bytes([flipped]) + content[place + 1 :]


def test_of_100_truncations_and_flipped_bits_all_are_found_out(tmp_path):
    save(tmp_path, 1, TENSORS, STATE)
    save(tmp_path, 2, TENSORS, STATE | {"epoch": 4})
    newest, previous = generations(tmp_path)
    content = (tmp_path / newest).read_bytes()
    for seed in range(100):
        (tmp_path / newest).write_bytes(damaged(content, random.Random(seed)))
        found = load(tmp_path)
        assert (found.number, found.damaged) == (1, (newest,))
        assert same(found)
    (tmp_path / newest).write_bytes(content)
    assert load(tmp_path).number == 2
    for name in (newest, previous):
        (tmp_path / name).write_bytes(b"")
    assert load(tmp_path) is None


def test_what_is_saved_after_a_damaged_one_takes_its_place(tmp_path):
    save(tmp_path, 1, TENSORS, STATE)
    save(tmp_path, 2, TENSORS, STATE)
    lost = generations(tmp_path)[0]
    (tmp_path / lost).write_bytes(b"torn")
    found = load(tmp_path)
    save(tmp_path, found.number + 1, TENSORS, STATE | {"epoch": 9})
    again = load(tmp_path)
    assert (again.number, again.state["epoch"], again.damaged) == (2, 9, ())
    assert lost not in generations(tmp_path)
    assert generations(tmp_path)[1].startswith("00000001-")


def written(folder, content, number=9):
    """A file with the checksum of its content in its name, whatever that is."""
    digest = hashlib.sha256(content).hexdigest()[:16]
    (folder / f"{number:08d}-{digest}.safetensors").write_bytes(content)


def lying(shape, end, state="{}"):
    header = {
        "__metadata__": {"state": state},
        "weights": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (1 << 62).to_bytes(8, "little") + b"{}",
        lying([1 << 40], 1 << 42),
        lying([1 << 40], 8),
        lying([1 << 62, 1 << 62], 8),
        lying([-1], 8),
        lying([2], 8, "not JSON"),
        (2).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_header_that_lies_costs_no_memory(tmp_path, content):
    save(tmp_path, 1, TENSORS, STATE)
    written(tmp_path, content)
    found = load(tmp_path)
    assert (found.number, len(found.damaged)) == (1, 1)


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_no_bytes_crash_a_load(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    written(folder, content)
    assert load(folder) is None


def test_a_full_disk_is_named_and_the_generation_before_stays(tmp_path, monkeypatch):
    save(tmp_path, 1, TENSORS, STATE)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 2, TENSORS, STATE)
    assert load(tmp_path).number == 1
    assert len(list(tmp_path.iterdir())) == 1
    with Writer(tmp_path, 1) as writer:
        writer.save(TENSORS, STATE)
        with pytest.raises(OSError, match="No space left on device"):
            writer.save(TENSORS, STATE)


def test_what_a_killed_writer_left_is_swept_away(tmp_path):
    half = tmp_path / ".writing-1-half"
    half.write_bytes(b"half")
    assert load(tmp_path) is None
    save(tmp_path, 1, TENSORS, STATE)
    assert half.exists()  # Another may be at work.
    os.utime(half, (0, 0))
    save(tmp_path, 2, TENSORS, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(generations(tmp_path))


def test_a_writer_saves_in_order_and_is_done_at_its_end(tmp_path, monkeypatch):
    gate, original = threading.Event(), checkpoint.save

    def save(*given):
        assert gate.wait(60)
        original(*given)

    monkeypatch.setattr(checkpoint, "save", save)
    with Writer(tmp_path, 6) as writer:
        writer.save(TENSORS, STATE)
        assert load(tmp_path) is None  # It did not wait for what it began.
        gate.set()
        writer.save(TENSORS, STATE | {"epoch": 4})
        assert load(tmp_path).number >= 7
    assert load(tmp_path).number == 8
    assert same(load(tmp_path), TENSORS, STATE | {"epoch": 4})


ENDLESS = """
import sys
from pathlib import Path
import torch
from raytickets.checkpoint import save
for number in range(1, 10**6):
    save(Path(sys.argv[1]), number, {"a": torch.full((50_000,), number)}, {"number": number})
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_process_that_is_killed_leaves_a_whole_one(tmp_path, seed):
    command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        told = int(writer.stdout.readline())
    time.sleep(random.Random(seed).random() / 50)
    os.kill(writer.pid, signal.SIGKILL)
    told = max([told, *(int(line) for line in writer.stdout.read().splitlines())])
    writer.wait()
    found = load(tmp_path)
    assert found.damaged == ()
    assert found.number >= told
    assert (found.tensors["a"] == found.number).all()
    assert found.state == {"number": found.number}
