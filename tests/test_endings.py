"""How the command ends whatever becomes of it, as a process of its own; all of it is slow."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from raytickets.journal import read_journal
from raytickets.sweep import Sweep, select

pytestmark = pytest.mark.slow

SPACE = """
from raytickets.config import *

def space():
    return SearchSpace(
        name="tiny",
        network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
        data=Data("digits", limit=256),
        penalties=(1e-3, 1e-2),
        prune_ratios=(0.3, 0.6),
        training=Training(epochs=20, learning_rate=0.05, batch_size=32),
        proof=Proof(budget=0.5, batch_size=32),
        round_to=1,
        retraining=Retraining(epochs=30, batch_size=32, num_workers=1),
        winners=1,
    )
"""
LONGEST_S = 300


class Command:
    """`raytickets search tiny.py --name first` in a folder; all its processes can be told."""

    def __init__(self, folder, *more):
        (folder / "tiny.py").write_text(SPACE)
        self.mark = uuid.uuid4().hex
        words = ["search", "tiny.py", "--name", "first", *more]
        with (folder / f"{self.mark}.out").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raytickets.cli", *words],
                cwd=folder,
                env=os.environ | {"RAYTICKETS_MARK": self.mark, "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._out = Path(out.name)

    @property
    def said(self):
        return self._out.read_text()

    def wait(self, timeout_s=LONGEST_S):
        return self.process.wait(timeout_s)

    def left(self):
        """Command lines of its processes that run, zombies aside."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " ")[:200])
            except OSError:
                continue  # It has ended, or is nobody's business.
        return found


@pytest.fixture
def start(tmp_path):
    started = []

    def call(*more, folder=tmp_path):
        started.append(Command(folder, *more))
        return started[-1]

    yield call
    for command in started:
        command.process.kill()
        command.process.wait()


def until(condition, command):
    """Wait for it as long as the command runs."""
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert command.process.poll() is None, command.said
        assert time.monotonic() < deadline, command.said
        time.sleep(0.05)


def told(folder, kind):
    """How many events of a kind the sweep's journal has."""
    sweep = folder / "sweeps" / "first"
    return len(select(read_journal(sweep), kind)) if (sweep / "journal.jsonl").exists() else 0


def tickets(folder):
    return {e["ticket"] for e in select(read_journal(folder / "sweeps" / "first"), "ticket")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The tickets of a sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = Command(folder)
    assert command.wait() == 0, command.said
    return tickets(folder)


def test_of_twenty_starts_of_one_name_one_runs(start, tmp_path):
    commands = [start() for _ in range(20)]
    began = time.monotonic()
    held = []
    while len(held) < 19:
        held = [command for command in commands if command.process.poll() == 4]
        assert time.monotonic() - began < 60, [command.said for command in commands]
        time.sleep(0.1)
    (running,) = [command for command in commands if command not in held]
    until(lambda: told(tmp_path, "sweep"), running)
    for command in held:
        assert re.fullmatch(
            rf"raytickets: first is held by process {running.process.pid} on .* since .*\n",
            command.said,
        )
    assert running.wait() == 0, running.said
    assert told(tmp_path, "sweep") == 1


@pytest.mark.parametrize(
    ("when", "number"),
    [("check", signal.SIGTERM), ("ticket", signal.SIGINT), ("winners", signal.SIGTERM)],
)
def test_an_interruption_ends_all_within_ten_seconds(start, tmp_path, undisturbed, number, when):
    command = start()
    until(lambda: told(tmp_path, when), command)
    command.process.send_signal(number)
    time.sleep(0.3)
    command.process.send_signal(signal.SIGINT)  # A second one changes nothing.
    assert command.wait(10) == 130, command.said
    assert "raytickets search tiny.py --name first" in command.said.splitlines()[-1]
    assert read_journal(tmp_path / "sweeps/first")[-1]["state"] == "interrupted"
    time.sleep(2)
    assert command.left() == []
    again = start()
    assert again.wait() == 0, again.said
    assert "found here: " in again.said
    assert tickets(tmp_path) == undisturbed


def test_sigterm_while_ray_starts_is_an_interruption(start):
    command = start()
    until(lambda: any("gcs_server" in line for line in command.left()), command)
    command.process.terminate()
    assert command.wait(10) == 130, command.said
    time.sleep(2)
    assert command.left() == []


def test_a_killed_driver_leaves_no_process_and_the_same_command_goes_on(
    start, tmp_path, undisturbed
):
    command = start()
    until(lambda: told(tmp_path, "ticket"), command)
    assert any("raylet" in line for line in command.left())
    command.process.kill()
    command.wait()
    killed = time.monotonic()
    while left := command.left():
        assert time.monotonic() - killed < 30, left
        time.sleep(0.2)
    assert Sweep(tmp_path / "sweeps/first").report()["state"] == "unfinished"
    again = start()
    assert again.wait() == 0, again.said
    assert tickets(tmp_path) == undisturbed


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=140m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_named_and_the_same_command_goes_on(
    start, tmp_path, small_disk, undisturbed
):
    (tmp_path / "sweeps").symlink_to(small_disk)
    command = start()
    until(lambda: told(tmp_path, "check"), command)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1 << 16))
            except OSError:
                break
    assert command.wait() == 3, command.said
    assert (
        f"make space to write in {small_disk}/first, and the same command goes on" in command.said
    )
    again = start()
    assert again.wait() == 2
    assert "has 0 MB left" in again.said or "must be writable" in again.said
    filler.unlink()
    again = start()
    assert again.wait() == 0, again.said
    assert tickets(tmp_path) == undisturbed


def test_storage_that_became_read_only_is_named(start, tmp_path, small_disk, undisturbed):
    (tmp_path / "sweeps").symlink_to(small_disk)
    command = start()
    until(lambda: told(tmp_path, "check"), command)
    # While files are open for writing, it cannot become so.
    command.process.send_signal(signal.SIGINT)
    assert command.wait(10) == 130
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    again = start()
    assert again.wait() == 2
    assert re.fullmatch(r"raytickets: storage: 'sweeps' .*Read-only file system.*\n", again.said)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    again = start()
    assert again.wait() == 0, again.said
    assert tickets(tmp_path) == undisturbed
