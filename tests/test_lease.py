"""One process holds a sweep, whatever happens to the one before it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from s3_server import serving

from raytickets import lease as leases
from raytickets import storage
from raytickets.lease import FILE, Held, Lost, hold

HOLD = """
import sys, time
from pathlib import Path
from raytickets.lease import Held, hold

sys.stdin.readline()
try:
    with hold(Path(sys.argv[1])) as lease:
        print("holds", lease.token, flush=True)
        time.sleep(60)
except Held as held:
    print(held.holder.pid, held.holder.host, flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """`start(20)` are processes that take the lease of one folder once they read a line."""
    started = []

    def call(count, folder=tmp_path / "first"):
        command = [sys.executable, "-c", HOLD, str(folder)]
        for _ in range(count):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-count:]

    yield call
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_lease_names_its_holder_and_its_number_grows(tmp_path):
    with hold(tmp_path / "first") as lease:
        assert (lease.holder.host, lease.holder.pid) == (socket.gethostname(), os.getpid())
    with hold(tmp_path / "first") as later:
        assert (lease.token, later.token) == (1, 2)


def test_a_lease_whose_file_names_another_holder_is_lost(tmp_path):
    """As on NFS, where one that was cut off loses its lock and hears nothing of it."""
    folder = tmp_path / "first"
    with hold(folder) as lease:
        lease.confirm()
        own = (folder / FILE).read_text()
        (folder / FILE).write_text(json.dumps(json.loads(own) | {"token": lease.token + 1}))
        with pytest.raises(Lost, match="the lease of first was lost: another process has taken"):
            lease.confirm()
        (folder / FILE).write_text(own)
        lease.confirm()
        (folder / FILE).unlink()
        with pytest.raises(Lost):
            lease.confirm()


def test_what_goes_wrong_under_a_lease_comes_through(tmp_path):
    with pytest.raises(FileNotFoundError, match="nosuch"), hold(tmp_path / "first"):
        (tmp_path / "nosuch").read_text()


@pytest.mark.parametrize("damage", [b"\0" * 80, b"{}", b'{"holder": 3}'])
def test_a_damaged_lease_can_be_held(tmp_path, damage):
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / FILE).write_bytes(damage)
    with hold(folder) as lease:
        assert lease.token == 1


def test_a_second_holder_is_told_of_the_first(tmp_path):
    folder = tmp_path / "first"
    with hold(folder) as lease:
        with pytest.raises(Held) as refused, hold(folder):
            pytest.fail("two hold it")
        assert refused.value.holder == lease.holder
        said = f"first is held by process {os.getpid()} on {socket.gethostname()} since 20"
        assert str(refused.value).startswith(said)
    with hold(folder):
        pass


def test_leases_of_other_folders_are_free(tmp_path):
    with hold(tmp_path / "first"), hold(tmp_path / "second"):
        pass


def test_of_twenty_at_once_one_holds_and_the_others_name_it(start):
    processes = start(20)
    for process in processes:
        process.stdin.close()
    said = {process.pid: process.stdout.readline().split() for process in processes}
    (holder,) = [pid for pid, words in said.items() if words == ["holds", "1"]]
    del said[holder]
    assert [*said.values()] == [[str(holder), socket.gethostname()]] * 19


def test_the_lease_of_a_killed_process_is_free_at_once(start):
    for token in ("1", "2", "3"):
        (process,) = start(1)
        process.stdin.close()
        assert process.stdout.readline().split() == ["holds", token]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_holder_that_was_killed_while_it_wrote_its_name_is_no_obstacle(tmp_path):
    with hold(tmp_path / "first"):
        pass
    file = tmp_path / "first" / FILE
    file.write_text(file.read_text() + '": 1}}')
    with hold(tmp_path / "first") as lease:
        assert lease.token == 2
    assert json.loads(file.read_text())["token"] == 2


def test_a_lease_whose_folder_was_removed_is_not_held_in_vain(tmp_path):
    """The file that is locked is the one at the path."""
    folder = tmp_path / "first"
    with hold(folder):
        (folder / FILE).unlink()
        folder.rmdir()
        with hold(folder):
            assert (folder / FILE).exists()


class Objects:
    """An object store that replaces versions, as `storage` has it for a local copy."""

    def __init__(self):
        self.content, self.version, self.answers = None, 0, True

    def read(self, path):  # noqa: ARG002
        self._answer()
        return None if self.content is None else (self.content, str(self.version))

    def put_if(self, path, content, version):  # noqa: ARG002
        self._answer()
        if version != (None if self.content is None else str(self.version)):
            raise storage.Changed
        self.content, self.version = content, self.version + 1
        return str(self.version)

    def _answer(self):
        if not self.answers:
            raise OSError("no answer")


@pytest.fixture
def objects(monkeypatch):
    found = Objects()
    monkeypatch.setattr(storage, "read", found.read)
    monkeypatch.setattr(storage, "put_if", found.put_if)
    for name, value in {"LIFE_S": 0.5, "RENEW_S": 0.05, "MARGIN_S": 0.2, "SKEW_S": 0.1}.items():
        monkeypatch.setattr(leases, name, value)
    return found


@pytest.fixture
def copy(tmp_path):
    """The local copy of s3://b/first."""
    return tmp_path / "raytickets/remote/s3/b/first"


def test_at_an_address_one_holds_as_long_as_it_lives(objects, copy):
    with hold(copy) as lease:
        time.sleep(0.8)  # longer than it lasts without being renewed
        lease.confirm()
        with pytest.raises(Held) as refused, hold(copy):
            pytest.fail("two hold it")
        assert refused.value.holder == lease.holder
        assert json.loads(objects.content)["token"] == lease.token
    with hold(copy) as later:
        assert later.token == lease.token + 1


def test_at_an_address_the_lease_of_a_killed_process_runs_out(objects, copy, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(leases._Renewal, "run", lambda _: None)
        with hold(copy):
            dead, version = objects.content, objects.version
    objects.content, objects.version = dead, version  # It did not give it back.
    with pytest.raises(Held), hold(copy):
        pytest.fail("it has not run out")
    time.sleep(0.7)
    with hold(copy) as lease:
        assert lease.token == json.loads(dead)["token"] + 1


def test_a_lease_that_cannot_be_renewed_is_lost_before_another_can_have_it(objects, copy):
    with hold(copy) as lease:
        lease.confirm()
        objects.answers = False
        time.sleep(0.4)  # of the 0.5 s that others wait for
        with pytest.raises(Lost, match=r"^the lease of first was lost: it could not be renewed"):
            lease.confirm()


def test_a_lease_that_another_process_took_is_lost_and_left_to_it(objects, copy):
    with hold(copy) as lease:
        objects.content, objects.version = b"another's", objects.version + 1
        time.sleep(0.2)
        with pytest.raises(Lost, match="another process has taken it"):
            lease.confirm()
    assert objects.content == b"another's"


def ended() -> int:
    """The pid of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


@pytest.fixture
def left(objects, copy, monkeypatch):
    """`left()` is a lease that this process never gave back, as it is in the store, and
    `left(record)` another one; both last `life_s` from now."""
    with monkeypatch.context() as killed:
        killed.setattr(leases._Renewal, "run", lambda _: None)
        with hold(copy):
            found = json.loads(objects.content)

    def put(record=found, life_s=100):
        objects.content = json.dumps(record | {"until": time.time() + life_s}).encode()
        return json.loads(objects.content)

    return put


def test_the_lease_of_a_folder_that_was_copied_to_an_address_is_free(objects, copy, tmp_path):
    with hold(tmp_path / "first"):
        objects.content = (tmp_path / "first" / FILE).read_bytes() + b"rest"
    with hold(copy) as lease:
        assert lease.token == 2


needs_proc = pytest.mark.skipif(leases._process() is None, reason="no /proc")


@needs_proc
def test_the_lease_of_a_process_that_ended_on_this_host_is_free_at_once(left, copy):
    record = left()
    record["holder"]["pid"] = ended()
    left(record)
    with hold(copy) as lease:
        assert lease.token == record["token"] + 1


@needs_proc
def test_that_its_pid_is_used_again_keeps_no_lease(left, copy):
    record = left()
    record["process"][2] = str(int(record["process"][2]) - 1)
    left(record)
    with hold(copy) as lease:
        assert lease.token == record["token"] + 1


def of_another_boot(record):
    record["process"][0] = "another boot"


def of_another_pid_namespace(record):
    record["process"][1] = "pid:[1]"


def of_another_host(record):
    record["holder"]["host"] = "another"


def that_did_not_say(record):
    record["process"] = None


@needs_proc
@pytest.mark.parametrize(
    "change", [of_another_boot, of_another_pid_namespace, of_another_host, that_did_not_say]
)
def test_a_holder_whose_pid_means_nothing_here_is_waited_for(left, copy, change):
    record = left()
    record["holder"]["pid"] = ended()
    change(record)
    left(record)
    with pytest.raises(Held), hold(copy):
        pytest.fail("nobody knows that it has ended")
    left(record, life_s=-1)
    with hold(copy) as lease:
        assert lease.token == record["token"] + 1


def test_without_proc_the_lease_of_a_process_that_ended_is_waited_for(left, copy, monkeypatch):
    record = left()
    record["holder"]["pid"] = ended()
    left(record)
    monkeypatch.setattr(leases, "_process", lambda _=None: None)
    with pytest.raises(Held), hold(copy):
        pytest.fail("nobody knows that it has ended")


@pytest.fixture
def address(tmp_path, monkeypatch):
    """The local copy of an address at a stand-in for S3."""
    with serving("bucket") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield tmp_path / "raytickets/remote/s3/bucket/first"


@pytest.mark.slow
def test_of_twenty_at_once_one_holds_at_an_address(start, address):
    processes = start(20, address)
    for process in processes:
        process.stdin.close()
    said = {process.pid: process.stdout.readline().split() for process in processes}
    (holder,) = [pid for pid, words in said.items() if words == ["holds", "1"]]
    del said[holder]
    assert [*said.values()] == [[str(holder), socket.gethostname()]] * 19


@needs_proc
@pytest.mark.slow
def test_of_a_process_that_is_killed_twenty_others_get_the_lease_once_at_an_address(start, address):
    """Each of them asks once, and the lease would last for two minutes."""
    (process,) = start(1, address)
    process.stdin.close()
    assert process.stdout.readline().split() == ["holds", "1"]
    (early,) = start(1, address)
    early.stdin.close()
    assert early.stdout.readline().split() == [str(process.pid), socket.gethostname()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    others = start(20, address)
    for other in others:
        other.stdin.close()
    said = {other.pid: other.stdout.readline().split() for other in others}
    (holder,) = [pid for pid, words in said.items() if words == ["holds", "2"]]
    del said[holder]
    assert [*said.values()] == [[str(holder), socket.gethostname()]] * 19
