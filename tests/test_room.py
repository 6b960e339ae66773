import contextlib
import dataclasses
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from head_node import Head

from raytickets.config import InputError, Resources
from raytickets.spaces import load_space

CPU = {"CPU": 1.0}


@pytest.fixture
def room():
    import raytickets.driver  # noqa: F401  which first sets what Ray reads when it is imported
    from raytickets import room

    return room


def space(**resources):
    return dataclasses.replace(load_space("digits"), resources=Resources(**resources))


@pytest.fixture
def machines(room, monkeypatch):
    """`machines([{}], [{"CPU": 4}])`: what the cluster has, one list for each look at it."""

    def have(*looks):
        clock, looks = [0.0], list(looks)
        time = SimpleNamespace(
            monotonic=lambda: clock[0], sleep=lambda s: clock.__setitem__(0, clock[0] + s)
        )
        monkeypatch.setattr(room, "time", time)
        monkeypatch.setattr(room, "_machines", lambda *_: looks.pop(0) if looks[1:] else looks[0])
        return clock

    return have


@pytest.fixture
def autoscaler(room):
    """`autoscaler(4, CPU=2)`: one with room for so many on machines of this kind; its requests."""

    def can(count, **resources):
        asked = []

        class Autoscaler(room._Autoscaler):
            def __init__(self):
                pass

            def can_bring(self, needed, wanted):
                asked.append((dict(needed), wanted))
                fits = all(resources.get(kind, 0) >= amount for kind, amount in needed.items())
                return fits and wanted <= count

            def withdraw(self):
                asked.append(None)

        return Autoscaler(), asked

    return can


def test_a_fixed_machine_is_asked_for_what_it_has(room, machines, autoscaler):
    machines([{"CPU": 4.0}, {"CPU": 3.0}])
    brings, asked = autoscaler(0)
    found = room._room(space(cpus_per_trial=2), 9, 0, brings)
    assert found == room.Room(cpus=2, gpus=0.0, slots=3, most=3, workers=7)
    assert asked[-1] is None


@pytest.mark.parametrize(
    ("gpus", "has", "slots", "workers"),
    [(None, 2.0, 2, 2), (0.25, 2.0, 4, 2), (0.0, 2.0, 4, 4), (None, 0.0, 4, 4)],
)
def test_one_gpu_each_where_there_are_any(room, machines, autoscaler, gpus, has, slots, workers):
    machines([{"CPU": 4.0, "GPU": has}])
    brings, _ = autoscaler(0)
    found = room._room(space(gpus_per_trial=gpus), 9, 0, brings)
    assert (found.slots, found.workers) == (slots, workers)
    assert found.gpus == (gpus if gpus is not None else float(has > 0))


@pytest.mark.parametrize(("gpus", "slots"), [(0.4, 4), (0.6, 2), (0.1, 20), (1 / 93, 186)])
def test_a_share_of_a_gpu_is_all_on_one(room, machines, autoscaler, gpus, slots):
    machines([{"CPU": 200.0, "GPU": 2.0}])
    brings, _ = autoscaler(0)
    assert room._room(space(gpus_per_trial=gpus), 200, 0, brings).slots == slots


def test_gpus_that_the_autoscaler_can_bring_count(room, machines, autoscaler):
    machines([{"CPU": 4.0}], [{"CPU": 4.0}], [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}])
    brings, _ = autoscaler(3, CPU=4, GPU=1)
    found = room._room(space(), 9, 60, brings)
    assert found == room.Room(cpus=1, gpus=1.0, slots=1, most=3, workers=1)


def test_a_head_node_without_cpus_waits_for_workers(room, machines, autoscaler):
    clock = machines(*[[{}]] * 20, [{}, {"CPU": 2.0}])
    brings, asked = autoscaler(6, CPU=2)
    found = room._room(space(gpus_per_trial=0), 100, 600, brings)
    assert found == room.Room(cpus=1, gpus=0.0, slots=2, most=6, workers=2)
    assert 0 < clock[0] < 60
    assert asked[-1] is None


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 11])
def test_no_more_is_wanted_than_the_autoscaler_can_hold(room, machines, autoscaler, count):
    machines([{"CPU": 1.0}])
    brings, asked = autoscaler(count, CPU=1)
    assert room._room(space(gpus_per_trial=0), 7, 0, brings).most == max(1, min(count, 7))
    assert all(request is None or request[1] <= 7 for request in asked)


def test_no_machine_by_the_deadline(room, machines, autoscaler, caplog):
    clock = machines([{}])
    brings, asked = autoscaler(6, CPU=2)
    with pytest.raises(room.NoRoom, match=r"no machine with 1 CPU came within 90 s"):
        room._room(space(gpus_per_trial=0), 3, 90, brings)
    assert clock[0] == pytest.approx(90, abs=2)
    assert [record.message for record in caplog.records] == [
        "no machine with 1 CPU yet: waited 0 of 90 s",
        "no machine with 1 CPU yet: waited 60 of 90 s",
    ]
    assert asked[-1] is None


def test_the_deadline_counts_from_when_the_last_machine_went(room, machines):
    clock = machines(*[[{"CPU": 2.0}]] * 2, [{}], [{"CPU": 2.0}], [{}])
    waiting = room.Waiting({"CPU": 1.0}, 90)
    slots = []
    for clock[0] in (0, 1000, 1060, 1100, 1130, 1219):
        slots.append(waiting.look())
    assert slots == [2, 2, 0, 2, 0, 0]
    clock[0] = 1220
    with pytest.raises(room.NoRoom):
        waiting.look()


def test_too_few_machines_are_none(room, machines):
    clock = machines([{"CPU": 2.0}], [{"CPU": 2.0}, {"CPU": 1.0}], [{"CPU": 2.0}], [{"CPU": 2.0}])
    waiting = room.Waiting({"CPU": 1.0}, 90, least=3)
    assert [waiting.look() for _ in range(3)] == [0, 3, 0]
    clock[0] += 90
    with pytest.raises(room.NoRoom, match=r"^no room for 3 workers of 1 CPU came within 90 s"):
        waiting.look()


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"cpus_per_trial": 3, "gpus_per_trial": 0}, r"cpus_per_trial: 3 .* over 2, nor can it"),
        ({"gpus_per_trial": 1}, r"gpus_per_trial: 1 .* over 0, nor can it"),
    ],
)
def test_what_no_machine_will_ever_have_is_refused_at_once(
    room, machines, autoscaler, resources, said
):
    clock = machines([{"CPU": 2.0}])
    brings, asked = autoscaler(6, CPU=2)
    with pytest.raises(InputError, match=said):
        room._room(space(**resources), 3, 90, brings)
    assert clock == [0.0]
    assert asked[-1] is None


def test_what_machines_have_only_together_is_refused(room, machines, autoscaler):
    machines([{"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}])
    brings, _ = autoscaler(0)
    with pytest.raises(InputError, match=r"^resources: .* no machine of the cluster has all"):
        room._room(space(cpus_per_trial=2, gpus_per_trial=1), 3, 90, brings)


def test_machines_that_were_given_notice_have_no_room(room, monkeypatch):
    nodes = [
        {"NodeID": "stays", "Alive": True, "Resources": {"CPU": 2.0}},
        {"NodeID": "goes", "Alive": True, "Resources": {"CPU": 4.0}},
        {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 8.0}},
    ]
    monkeypatch.setattr(room.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(room.ray_state.state, "get_draining_nodes", lambda: {"goes": 0})
    assert room.workers_now(0.0) == 2
    with pytest.raises(room.NoRoom):
        room.Waiting({"CPU": 4.0}, 0.0).look()
    assert room.Waiting({"CPU": 4.0}, 0.0, noticed=True).look() == 1


def test_a_deadline_that_is_none(room, monkeypatch):
    monkeypatch.setenv("RAYTICKETS_DEADLINE_S", "soon")
    with pytest.raises(InputError, match="RAYTICKETS_DEADLINE_S"), room.connected(space()):
        pass


@pytest.fixture
def outside(room, monkeypatch):
    """No Ray is connected, whatever other tests have; `outside(host)` is one that lets us in."""
    monkeypatch.setattr(room.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(room.ray, "init", lambda *_, **__: pytest.fail("Ray was reached"))

    def stands(host):
        ended = []
        monkeypatch.setattr(room.ray, "init", lambda *_, **__: None)
        nodes = [{"Alive": True, "NodeManagerAddress": host, "Resources": {"CPU": 2.0}}]
        monkeypatch.setattr(room.ray, "nodes", lambda: nodes)
        monkeypatch.setattr(room.ray, "shutdown", lambda: ended.append(True))
        monkeypatch.setattr(room, "_room", lambda *_: "room")
        monkeypatch.setattr(room, "_Autoscaler", lambda expected: None)  # noqa: ARG005
        return ended

    return stands


@pytest.mark.usefixtures("outside")
def test_an_address_where_no_ray_is(room, monkeypatch):
    nowhere = "127.0.0.1:none"
    with pytest.raises(InputError, match=r"^address: .* no Ray"), room.connected(space(), nowhere):
        pass
    monkeypatch.setenv("RAY_ADDRESS", nowhere)
    with pytest.raises(InputError, match=r"^RAY_ADDRESS: .* no Ray"), room.connected(space()):
        pass


@pytest.mark.parametrize(("host", "token"), [("10.0.0.1", True), ("127.0.0.1", False)])
def test_off_loopback_ray_wants_a_token(room, outside, monkeypatch, host, token):
    ended = outside(host)
    monkeypatch.setattr(room, "is_token_auth_enabled", lambda: token)
    with room.connected(space(), "auto") as found:
        assert found == "room"
        assert not ended
    assert ended == [True]


def test_off_loopback_ray_is_refused_without_a_token(room, outside, monkeypatch):
    ended = outside("10.0.0.1")
    monkeypatch.setattr(room, "is_token_auth_enabled", lambda: False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    said = r"^RAY_AUTH_MODE: None .* must be token, as Ray listens on 10\.0\.0\.1"
    with pytest.raises(InputError, match=said), room.connected(space(), "auto"):
        pass
    assert ended == [True]


def test_nobody_else_reads_the_token_of_a_ray_that_is_started_here(
    room, outside, monkeypatch, tmp_path
):
    outside("127.0.0.1")
    monkeypatch.setattr(room, "_agents_end_with_us", contextlib.nullcontext)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir(mode=0o755)
    with room.connected(space(), "local"):
        assert stat.S_IMODE((tmp_path / ".ray").stat().st_mode) == 0o700


@pytest.mark.usefixtures("ray_instance")
def test_a_ray_that_is_connected_is_taken_and_left_as_it_is(room):
    with room.connected(space(gpus_per_trial=0)) as found:
        assert found == room.Room(cpus=1, gpus=0.0, slots=2, most=2, workers=2)
    assert room.ray.is_initialized()


# For real

LISTENERS = """
import raytickets.driver
from raytickets.room import connected
from raytickets.spaces import load_space
import os, re, subprocess
with connected(load_space("digits")):
    parents = {}
    def said(*words):
        return subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    for line in said("ps", "-e", "-o", "pid=,ppid="):
        child, parent = map(int, line.split())
        parents[child] = parent
    def mine(pid):
        return pid == os.getpid() or (pid in parents and mine(parents[pid]))
    for line in said("ss", "-ltnpH"):
        for pid in re.findall(r"pid=(\\d+)", line):
            if mine(int(pid)):
                print("LISTENS", line.split()[3])
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_what_is_started_here_listens_on_loopback_alone():
    environment = {name: v for name, v in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", LISTENERS], env=environment, capture_output=True, text=True
    )
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("LISTENS")]
    assert len(found) > 3, done.stdout + done.stderr
    assert not [each for each in found if "127.0.0.1" not in each]


GROWN = """
import sys, time
import raytickets.driver
from raytickets import room
from raytickets.config import InputError, Resources
from raytickets.spaces import load_space
import dataclasses
digits = load_space("digits")
def space(**resources):
    return dataclasses.replace(digits, resources=Resources(**resources))
for resources in ({"cpus_per_trial": 3}, {"gpus_per_trial": 1.0}):
    try:
        with room.connected(space(**resources), sys.argv[1]):
            print("taken", resources)
    except InputError as error:
        print("refused", error)
with room.connected(space(), sys.argv[1], 100) as found:
    print("found", found)
    begun = time.monotonic()
    while room._machines() != [m for m in room._machines() if not m.get("CPU")]:
        if time.monotonic() - begun > 150:
            break
        time.sleep(1)
    print("left", sum(m.get("CPU", 0) for m in room._machines()))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_come_from_zero_and_go_when_nothing_is_asked_for(tmp_path):
    worker = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 3}
    head = Head(tmp_path, cpus=0, token=False, types={"cpu": worker}, max_workers=3)
    with contextlib.ExitStack() as ending:
        ending.callback(head.end)
        head.wait()
        done = subprocess.run(
            [sys.executable, "-c", GROWN, head.gcs],
            env=head.environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        said = done.stdout + done.stderr
        assert said.count("refused") == 2, said
        assert "cpus_per_trial: 3" in said
        assert "'GPU': '1'" in said
        assert "most=6" in said, said
        assert "left 0" in said, said
