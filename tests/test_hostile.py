"""A ticket from a stranger is refused in one line, and runs, allocates and writes nothing."""

import contextlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ticket import saved_ticket

from raytickets.config import InputError
from raytickets.ticket import (
    MANIFEST,
    WEIGHTS,
    DamagedTicket,
    _id,
    _sha256,
    load_ticket,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return saved_ticket(tmp_path_factory.mktemp("good")).path


@pytest.fixture
def hostile(good, tmp_path):
    """`hostile(change)` is a copy of the good ticket that `change` was made to."""

    def make(change, name="ticket"):
        path = shutil.copytree(good, tmp_path / name)
        change(path)
        return path

    return make


def sealed(path, manifest):
    """Write a manifest whose own checksum is right."""
    manifest = {name: value for name, value in manifest.items() if name != "id"}
    (path / MANIFEST).write_text(json.dumps({"id": _id(manifest), **manifest}))


def field(place, value):
    """Another value for a field such as `network.options`, with all checksums right."""

    def change(path):
        manifest = json.loads((path / MANIFEST).read_text())
        *parents, last = [int(key) if key.isdigit() else key for key in place.split(".")]
        part = manifest
        for key in parents:
            part = part[key]
        part[last] = value
        sealed(path, manifest)

    return change


def without(name):
    def change(path):
        manifest = json.loads((path / MANIFEST).read_text())
        del manifest[name]
        sealed(path, manifest)

    return change


def text(old, new):
    """A manifest with other text, in which the checksum is the least that is wrong."""

    def change(path):
        before = (path / MANIFEST).read_text()
        assert old in before
        (path / MANIFEST).write_text(before.replace(old, new, 1))

    return change


def content(name, value):
    def change(path):
        (path / name).write_bytes(value)
        if name == WEIGHTS:
            field("files", {WEIGHTS: _sha256(path / name)})(path)

    return change


def half(name):
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def header(tensors, data=b"\0" * 64):
    written = json.dumps(tensors).encode()
    return content(WEIGHTS, struct.pack("<Q", len(written)) + written + data)


def f32(shape, start, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def tensors(change_them):
    def change(path):
        found = safetensors.torch.load_file(path / WEIGHTS)
        content(WEIGHTS, safetensors.torch.save(change_them(found)))(path)

    return change


def linked(name, target):
    def change(path):
        (path / name).unlink()
        (path / name).symlink_to(target)

    return change


def piped(name):
    def change(path):
        (path / name).unlink()
        os.mkfifo(path / name)

    return change


def moved(path):
    """The right weights, but by a link that leads out of the folder."""
    (path / WEIGHTS).rename(path.parent / f"{path.name}-weights")
    (path / WEIGHTS).symlink_to(path.parent / f"{path.name}-weights")


def folder_of_weights(path):
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).mkdir()


def sparse(path):
    (path / WEIGHTS).write_bytes(struct.pack("<Q", 64) + b"{}" + b" " * 62)
    os.truncate(path / WEIGHTS, 2**42)


def all_groups(change_them):
    def change(path):
        groups = json.loads((path / MANIFEST).read_text())["groups"]
        field("groups", change_them(groups))(path)

    return change


class Payload:
    def __reduce__(self):
        return os.system, ("touch stranger-was-here",)


PICKLE = pickle.dumps(Payload())

AT_ONCE = {
    "a network of the Hub": field("network.name", "timm/hf-hub:somebody/net"),
    "another schema": field("schema", 2),
    "a field missing": without("macs"),
    "no field for the files": without("files"),
    "no files": field("files", {}),
    "an unknown field": field("macros", "x"),
    "a word for a number": field("seed", "0"),
    "a truth value for a number": field("seed", True),
    "null for the groups": field("groups", None),
    "a list for the manifest": content(MANIFEST, b"[]"),
    "no text": content(MANIFEST, b"\xff\xfe\0"),
    "no fields": content(MANIFEST, b"{}"),
    "nothing": content(MANIFEST, b""),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "no weights": lambda path: (path / WEIGHTS).unlink(),
    "half a manifest": half(MANIFEST),
    "half of the weights": half(WEIGHTS),
    "empty weights": lambda path: os.truncate(path / WEIGHTS, 0),
    "NaN": text('"penalty": 0.001', '"penalty": NaN'),
    "infinity": text('"penalty": 0.001', '"penalty": 1e999'),
    "a negative penalty": field("penalty", -1),
    "a number of 400 digits": field("macs", 10**400),
    "100,000 lists in each other": content(MANIFEST, b"[" * 100_000),
    "lists in each other as options": text(
        '"options": {', '"options": {"x": ' + "[" * 50_000 + "]" * 50_000 + ", "
    ),
    "a manifest of 5 MB": content(MANIFEST, b" " * 5 * 2**20),
    "a field twice": text('"seed": 0', '"seed": 1,\n "seed": 0'),
    "an id that is a path": text('"id": "', '"id": "../'),
    "an altered manifest": text('"macs": 350000', '"macs": 350001'),
    "a file outside": field("files", {f"../{WEIGHTS}": "0" * 64}),
    "a file of the system": field("files", {"/etc/passwd": "0" * 64}),
    "a wrong hash": field("files", {WEIGHTS: "0" * 64}),
    "a mask of other characters": field("groups.0.mask", "2" * 8),
    "a mask that keeps nothing": field("groups.0.mask", "0" * 8),
    "a cut of another length": field("groups.0.cut", "1"),
    "an escape sequence": field("space.name", "\x1b[2J\x1b]0;owned\x07"),
    "an escape sequence as an option": field("network.options", {"depth": "\x1b[31m"}),
    "text from right to left": field("network.name", "cifar_vgg\u202egnp"),
    "half a surrogate": field("network.options", {"depth": "\ud800"}),
    "markup as a layer": field("groups.0.name", "[link=http://x]conv[/link]"),
    "a layer of a million letters": field("groups.0.name", "x" * 10**6),
    "10^12 classes": field("network.num_classes", 10**12),
    "images of 10^9 pixels": field("network.image_size", 10**9),
    "10^9 channels": field("network.in_channels", 10**9),
    "a million layers": field("network.options", {"depth": 10**6}),
    "a billion times as wide": field("network.options", {"depth": 9, "width": 1e9}),
    "a million numbers": field("network.options", {"layers": [9] * 10**5}),
    "weights behind a link": linked(WEIGHTS, "/etc/passwd"),
    "the right weights behind a link": moved,
    "an endless manifest": linked(MANIFEST, "/dev/zero"),
    "a pipe for the weights": piped(WEIGHTS),
    "a pipe for the manifest": piped(MANIFEST),
    "a folder for the weights": folder_of_weights,
    "one more file": lambda path: (path / "model.pkl").write_bytes(PICKLE),
    "a pickle for the weights": content(WEIGHTS, PICKLE),
    "a pickle for the manifest": content(MANIFEST, PICKLE),
    "a file of PyTorch for the weights": lambda path: torch.save({}, path / WEIGHTS),
    "a header of 2^60 bytes": content(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"),
    "a header beyond the file": content(WEIGHTS, struct.pack("<Q", 4096) + b"{}"),
    "a tensor of 10^15 numbers": header({"w": f32([10**15], 0, 4 * 10**15)}),
    "tensors over each other": header({"v": f32([16], 0, 64), "w": f32([8], 0, 32)}),
    "a hole between tensors": header({"v": f32([4], 0, 16), "w": f32([8], 32, 64)}),
    "a tensor beyond the file": header({"w": f32([32], 0, 128)}),
    "a shape that lies": header({"w": f32([4], 0, 64)}),
    "4 TB of nothing": sparse,
}
"""Refused by `load_ticket` already."""

LATER = {
    "a network 9,000 times as wide": field("network.options", {"depth": 9, "width": 9e3}),
    "a network of 9,998 layers": lambda path: (
        field("network.name", "cifar_resnet")(path),
        field("network.options", {"depth": 9998})(path),
    ),
    "a million classes": field("network.num_classes", 10**6),
    "images of one pixel": field("network.image_size", 1),
    "images of other channels": field("network.in_channels", 3),
    "a network that there is not": field("network.name", "cifar_vg"),
    "a network of a stranger's size": lambda path: (
        field("network.name", "timm/pit_ti_224")(path),
        field("network.options", {"img_size": 9900, "patch_size": 1, "stride": 1})(path),
    ),
    "code of a stranger": field("network.name", "stranger:network"),
    "a file of a stranger": field("network.name", "stranger.py:network"),
    "an option that there is not": field("network.options", {"checkpoint": "x.pt"}),
    "an option that fetches weights": lambda path: (
        field("network.name", "resnet18")(path),
        field("network.options", {"weights": "DEFAULT"})(path),
    ),
    "a mask for a wider network": all_groups(
        lambda groups: [{**g, "mask": g["mask"] + "0", "cut": g["cut"] + "0"} for g in groups]
    ),
    "a mask of a million channels": all_groups(
        lambda groups: [{**groups[0], "mask": "1" * 10**6, "cut": "1" * 10**6}, *groups[1:]]
    ),
    "groups in another order": all_groups(lambda groups: groups[::-1]),
    "no groups": all_groups(lambda _: []),
    "another mask": all_groups(
        lambda groups: [{**g, "mask": "1" * len(g["mask"])} for g in groups]
    ),
    "weights of another shape": tensors(lambda w: {n: t.flatten() for n, t in w.items()}),
    "weights of another precision": tensors(lambda w: {n: t.half() for n, t in w.items()}),
    "weights of four bits": tensors(
        lambda w: {
            n: torch.zeros(t.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
            if t.numel() % 2 == 0
            else t
            for n, t in w.items()
        }
    ),
    "a weight missing": tensors(lambda w: dict([*w.items()][1:])),
    "one more weight": tensors(lambda w: w | {"extra": torch.zeros(1)}),
    "no weights": tensors(lambda _: {}),
    "a weight that is NaN": tensors(
        lambda w: {n: t * float("nan") if n == "head.bias" else t for n, t in w.items()}
    ),
}
"""Refused by `Ticket.network`, which knows what the network is."""


@pytest.mark.parametrize("name", AT_ONCE)
def test_it_is_refused_before_anything_is_built(hostile, name):
    with pytest.raises(DamagedTicket) as refused:
        load_ticket(hostile(AT_ONCE[name]))
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", LATER)
def test_it_is_refused_before_it_is_a_network(hostile, name):
    ticket = load_ticket(hostile(LATER[name]))
    with pytest.raises((DamagedTicket, InputError)) as refused:
        ticket.network()
    assert str(refused.value).isprintable()
    with pytest.raises((DamagedTicket, InputError)):
        ticket.fresh_network(seed=0)


def test_what_does_not_fit_the_network_is_named(hostile):
    ticket = load_ticket(hostile(LATER["a mask for a wider network"]))
    with pytest.raises(DamagedTicket, match="channel groups"):
        ticket.network()


def test_code_named_by_a_ticket_runs_only_when_trusted(hostile, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise KeyboardInterrupt('the stranger ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = hostile(LATER["code of a stranger"])
    with pytest.raises(InputError, match="trust_code"):
        load_ticket(path).network()
    with pytest.raises(KeyboardInterrupt, match="the stranger ran"):
        load_ticket(path, trust_code=True).network()


# What needs trust is not built only to show a ticket of it.
@pytest.mark.parametrize("name", [*AT_ONCE, *(n for n in LATER if "stranger" not in n)])
def test_show_refuses_it_in_one_line(hostile, cli, name):
    path = hostile((AT_ONCE | LATER)[name])
    code, output, errors = cli("show", str(path))
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert errors.rstrip("\n").isprintable()
    assert errors.startswith(("raytickets: ticket: ", "raytickets: network."))


WATCHED = """
import json, os, resource, sys, time

from raytickets.config import InputError, Network
from raytickets.models import build_network
from raytickets.ticket import DamagedTicket, load_ticket

good, *paths = map(str.strip, sys.stdin)
load_ticket(good).network()
build_network(Network("resnet18"), in_channels=3, num_classes=2, seed=0)


def peak():
    # ru_maxrss would be the parent's, which is larger.
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0])


open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = peak()
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 8 * 2**30,) * 2)
home = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(json.__file__)))
seen = []


def watch(event, arguments):
    writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    runs = event in ("exec", "compile") and not str(
        arguments[0].co_filename if event == "exec" else arguments[1]
    ).startswith((*home, "<frozen"))
    others = ("pickle.", "os.system", "os.exec", "os.posix_spawn", "subprocess.", "socket.")
    if writes or runs or event.startswith(others):
        seen.append(f"{event} {arguments!r:.200}")


sys.addaudithook(watch)
slow, allowed = [], []
for path in paths:
    started = time.monotonic()
    try:
        load_ticket(path).network()
        allowed.append(path)
    except (DamagedTicket, InputError):
        pass
    slow.append((time.monotonic() - started, path))
grown = peak() - before
print(json.dumps({"seen": seen, "allowed": allowed, "grown": grown, "slowest": max(slow)}))
"""


@pytest.mark.slow
def test_all_of_them_run_nothing_and_take_no_memory(hostile, good, tmp_path):
    (tmp_path / "stranger.py").write_text("raise SystemExit('the stranger ran')\n")
    cases = [*AT_ONCE.values(), *LATER.values()]
    assert len(cases) >= 30
    paths = [hostile(change, f"ticket{place}") for place, change in enumerate(cases)]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        input="\n".join(map(str, [good, *paths])),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["seen"] == []
    assert told["allowed"] == []
    assert told["grown"] < 256 * 1024, "KiB"
    assert not (tmp_path / "stranger-was-here").exists()


@pytest.mark.slow
def test_the_watch_sees_what_it_is_for(good, tmp_path):
    """It finds a pickle, code, a process, a written file and 512 MiB where there are some."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WATCHED.replace(
                "slow, allowed = [], []",
                "import pickle; pickle.loads(pickle.dumps(os.getcwd)); exec('1'); "
                "os.system('true'); open('x', 'w').close(); bytearray(b'1') * 2**29; "
                "slow, allowed = [], []",
            ),
        ],
        input=f"{good}\n{good}",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    kinds = {event.split()[0] for event in told["seen"]}
    assert kinds >= {"pickle.find_class", "exec", "compile", "os.system", "open"}
    assert told["allowed"] == [str(good)]
    assert told["grown"] > 256 * 1024


once = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)


@once
@given(data=st.data())
def test_any_byte_changed_gives_the_right_ticket_or_none(good, tmp_path, data):
    path = tmp_path / "mutated"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    file = path / data.draw(st.sampled_from([MANIFEST, WEIGHTS]))
    old = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        old[data.draw(st.integers(0, len(old) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(old[: data.draw(st.sampled_from([len(old), len(old) - 1]))])
    try:
        ticket = load_ticket(path)
    except DamagedTicket:
        return
    assert ticket.manifest == load_ticket(good).manifest


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@settings(once, max_examples=60)
@given(data=st.data())
def test_any_field_changed_is_shown_and_built_or_refused(good, tmp_path, data):
    from raytickets.console import ticket_table

    path = tmp_path / "changed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    part = manifest = json.loads((path / MANIFEST).read_text())
    while True:
        key = data.draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))
        if not isinstance(part[key], dict | list) or data.draw(st.booleans()):
            break
        part = part[key]
        if not part:
            return
    part[key] = data.draw(leaves)
    sealed(path, manifest)
    try:
        ticket = load_ticket(path)
    except DamagedTicket:
        return
    ticket_table(ticket)
    with contextlib.suppress(DamagedTicket, InputError):
        ticket.network()
