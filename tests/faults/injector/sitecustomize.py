"""Puts faults into raytickets' processes: with this folder on PYTHONPATH each runs it first.

RAYTICKETS_FAULTS is a folder. `plan.json` in it lists faults, {kind, at}; each strikes once, in
whichever process comes first to the `at`th call of its place, counted over all processes. Where
there is a folder `steps` in it, a file there for every time that training began or went on, named
<nanoseconds>@<trajectory, ticket or dense>@<epochs before>, gets a byte for every step.
"""

import errno
import importlib.machinery
import json
import os
import signal
import sys
import time
from pathlib import Path


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a full disk")


def refuse(*_):
    raise ConnectionError("injected: the tracking server is away")


def tear(journal, event):
    journal.path.open("a").write(json.dumps(event)[:40])
    die()


def flip_journal(journal, _):
    damage(journal.path, journal.path.stat().st_size // 2)
    die()


def flip_checkpoint(journal, _):
    strike_newest(journal.path.parent.glob("checkpoints/*/*.safetensors"))
    die()


def flip_ticket(journal, _):
    strike_newest(journal.path.parent.glob("tickets/*/ticket.safetensors"))
    die()


def strike_newest(files):
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is not None:
        damage(newest, newest.stat().st_size // 2)


def damage(path, place):
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 0x55]))


# kind: the module and the function before whose call it strikes, and what it does
PLACES = {
    "worker killed in an epoch": ("raytickets.trajectory", "accuracy", die),
    "worker killed at a ticket": ("raytickets.ticket", "sync", die),
    "worker killed at a checkpoint": ("raytickets.checkpoint", "save", die),
    "worker killed in a proof": ("raytickets.draw", "fine_tune", die),
    "rank killed in retraining": ("raytickets.retrain", "epoch_event", die),
    "disk full at a checkpoint": ("raytickets.checkpoint", "save", full),
    "disk full at a ticket": ("raytickets.draw", "save_ticket", full),
    "disk full at the journal": ("raytickets.journal", "Journal.append", full),
    "driver killed": ("raytickets.journal", "Journal.append", die),
    "driver killed within a line": ("raytickets.journal", "Journal.append", tear),
    "driver stopped": ("raytickets.journal", "Journal.append", interrupt),
    "journal damaged": ("raytickets.journal", "Journal.append", flip_journal),
    "checkpoint damaged": ("raytickets.journal", "Journal.append", flip_checkpoint),
    "ticket damaged": ("raytickets.journal", "Journal.append", flip_ticket),
    "tracking refused": ("raytickets.store", "Store._call", refuse),
}

# module: the function that begins a run before the module's `fit` trains it, and the run's name
RUNS = {
    "raytickets.trajectory": ("checks", lambda trajectory, *_: trajectory.id),
    "raytickets.retrain": ("_retrain_one", lambda _, job, *__: job.run),
}


def called(folder, place):
    """How often any process has come to a place, this time included."""
    with (folder / place.replace(" ", "-")).open("a") as file:
        file.write(".")
        file.flush()
        return os.fstat(file.fileno()).st_size


def struck(folder, number):
    """Whether this process is the one in which a fault strikes."""
    try:
        (folder / f"struck-{number}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def patch(module, folder, faults):
    for name in {fault["kind"]: None for fault in faults}:
        where, function, act = PLACES[name]
        if where == module.__name__:
            mine = [(n, f["at"]) for n, f in enumerate(faults) if f["kind"] == name]
            wrap(module, function, act, folder, name, mine)


def wrap(module, function, act, folder, name, faults):
    owner = module
    *outer, last = function.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, last)

    def with_faults(*args, **kwargs):
        count = called(folder, name)
        for number, at in faults:
            if count >= at and struck(folder, number):
                act(*args)
        return original(*args, **kwargs)

    setattr(owner, last, with_faults)


def count_steps(module, folder):
    function, name_of = RUNS[module.__name__]
    begin, fit, runs = getattr(module, function), module.fit, []

    def begun(*args):
        runs.append(name_of(*args))
        return begin(*args)

    def counted(network, optimizer, *args, **kwargs):
        path = folder / f"{time.time_ns()}@{runs[-1]}@{kwargs['first']}"
        file, step = path.open("wb", buffering=0), optimizer.step

        def step_and_count(rate):
            step(rate)
            file.write(b".")

        optimizer.step = step_and_count
        return fit(network, optimizer, *args, **kwargs)

    setattr(module, function, begun)
    module.fit = counted


class Hook:
    """Patches modules right after they were imported."""

    def __init__(self, folder, faults):
        self.folder, self.faults = folder, faults
        self.wanted = {PLACES[fault["kind"]][0] for fault in faults}
        self.counts = (folder / "steps").exists()
        if self.counts:
            self.wanted |= set(RUNS)

    def find_spec(self, name, path=None, target=None):
        if name not in self.wanted:
            return None
        self.wanted.discard(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module, self.folder, self.faults)
            if self.counts and name in RUNS:
                count_steps(module, self.folder / "steps")

        spec.loader.exec_module = exec_module
        return spec


if folder := os.environ.get("RAYTICKETS_FAULTS"):
    plan = json.loads((Path(folder) / "plan.json").read_text())
    sys.meta_path.insert(0, Hook(Path(folder), plan))
