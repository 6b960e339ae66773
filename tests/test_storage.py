import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from obstore.store import MemoryStore
from optuna.trial import TrialState
from s3_server import serving

from raytickets import storage
from raytickets.config import InputError
from raytickets.journal import NAME, read_journal
from raytickets.lease import FILE, LIFE_S, SKEW_S
from raytickets.study import point
from raytickets.sweep import select
from raytickets.ticket import load_ticket

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # Of what tests before these left behind.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Local copies are in a folder of the test's own."""
    monkeypatch.setenv("RAYTICKETS_WORK", str(tmp_path / "one"))
    stores = storage._store
    stores.cache_clear()
    yield
    stores.cache_clear()


@pytest.fixture(scope="module")
def server():
    with serving("bucket") as environment:
        yield environment


@pytest.fixture
def s3(server, monkeypatch):
    for name, value in server.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def sweeps(request, tmp_path, monkeypatch):
    """The local copy of an address that holds nothing yet."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    else:
        store = MemoryStore()
        monkeypatch.setattr(storage, "_store", lambda *_: store)
    return storage.local(f"s3://bucket/{tmp_path.parent.name}/{tmp_path.name}/sweeps")


def elsewhere(path, tmp_path):
    """The same thing's local copy on another machine."""
    return tmp_path / "two" / path.relative_to(tmp_path / "one")


def ticket(folder, weights=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ticket.safetensors").write_bytes(weights)
    (folder / "manifest.json").write_bytes(b"{}")
    return folder


def test_a_folder_is_its_own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.local("sweeps") == tmp_path / "sweeps"
    assert storage.local(tmp_path) == storage.local(f"file://{tmp_path}") == tmp_path
    assert storage.local("~/sweeps") == Path.home() / "sweeps"
    assert storage.address(tmp_path / "sweeps") == str(tmp_path / "sweeps")


def test_nothing_is_uploaded_from_or_downloaded_to_a_plain_path(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_store", lambda *_: pytest.fail("a store was reached"))
    assert storage.fetch(tmp_path / "none") == tmp_path / "none"
    assert storage.fetch_journal(tmp_path / "none.jsonl") == tmp_path / "none.jsonl"
    assert storage.names(tmp_path) == []
    path = ticket(tmp_path / "tickets" / "a")
    storage.keep(path)
    storage.keep_database(path / "manifest.json")
    assert storage.fetch_database(path / "none") == path / "none"
    (path / "ticket.safetensors").write_bytes(b"damaged")
    assert storage.fetch(path, again=True) == path
    assert (path / "ticket.safetensors").read_bytes() == b"damaged"
    assert storage.names(path) == ["manifest.json", "ticket.safetensors"]
    assert storage.names(tmp_path / "none") == []
    storage.remove(path / "manifest.json")
    assert storage.names(path) == ["ticket.safetensors"]
    for _ in range(2):
        storage.remove(path)
        assert not path.exists()
    for reader in (storage.read, lambda path: storage.put_if(path, b"", None)):
        with pytest.raises(ValueError, match="not the local copy"):
            reader(path)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("rest", ["bucket", "bucket/sweeps", "my.bucket/a=1/_b/c-d"])
def test_a_local_copy_tells_its_address(scheme, rest, tmp_path, monkeypatch):
    path = storage.local(f"{scheme}://{rest}/")
    assert path == tmp_path / "one/raytickets/remote" / scheme / rest
    # What a Path makes of an address, as a command line may do.
    assert storage.local(Path(f"{scheme}://{rest}")) == path
    assert storage.local(path) == path
    monkeypatch.delenv("RAYTICKETS_WORK")
    monkeypatch.setenv("HOME", "/nowhere")
    assert storage.address(path) == f"{scheme}://{rest}"
    assert storage.address(path / "a" / "b.txt") == f"{scheme}://{rest}/a/b.txt"
    monkeypatch.chdir(path.anchor)
    assert storage.address(path.relative_to(path.anchor)) == f"{scheme}://{rest}"


def test_local_copies_are_in_the_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYTICKETS_WORK")
    monkeypatch.setenv("RAYTICKETS_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert storage.local("s3://b/c") == tmp_path / "cache/raytickets/remote/s3/b/c"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.local("s3://b/c") == tmp_path / ".cache/raytickets/remote/s3/b/c"


def test_azure_takes_its_account_from_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match="Account must be specified"):
        storage.local("az://container/sweeps")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "me")
    path = storage.local("az://container/sweeps")
    assert storage.address(path) == "az://container/sweeps"


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("ftp://host/sweeps", "s3://, gs://, az://"),
        ("hdfs://host/sweeps", "s3://, gs://, az://"),
        ("s3://", "must be a bucket"),
        ("s3://bucket//sweeps", "must be a bucket"),
        ("s3://bucket/../sweeps", "must be a bucket"),
        ("s3://bucket/a b", "must be a bucket"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(given, allowed):
    with pytest.raises(InputError) as refused:
        storage.local(given)
    assert refused.value.args[0] == "storage"
    assert allowed in str(refused.value)


@pytest.mark.parametrize(
    "given",
    ["s3://key:sec/ret@bucket/x", "s3://bucket/x?secret_key=secret", "ftp://me:secret@host/x"],
)
def test_an_address_with_credentials_is_refused_and_not_shown(given):
    with pytest.raises(InputError) as refused:
        storage.local(given)
    scheme = given.partition(":")[0]
    allowed = "must hold no credentials and no options: they are taken from the environment"
    assert str(refused.value) == f"storage: '{scheme}://...' is not allowed: {allowed}"


def test_without_the_extra_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InputError, match=r"^storage: 's3://bucket' .* its extra cluster$"):
        storage.local("s3://bucket/sweeps")


def test_a_ticket_is_found_on_another_machine(sweeps, tmp_path):
    weights = bytes(range(256)) * 50_000  # In parts.
    path = ticket(sweeps / "first" / "tickets" / "a", weights)
    storage.keep(path)
    there = elsewhere(path, tmp_path)
    assert not there.exists()
    assert storage.fetch(there) == there
    assert (there / "ticket.safetensors").read_bytes() == weights
    assert (there / "manifest.json").read_bytes() == b"{}"
    assert [child.name for child in there.parent.iterdir()] == ["a"]


def test_what_is_damaged_here_is_fetched_again(sweeps):
    path = ticket(sweeps / "a")
    storage.keep(path)
    (path / "ticket.safetensors").write_bytes(b"damaged")
    (path / "more").touch()
    storage.fetch(path)
    assert (path / "ticket.safetensors").read_bytes() == b"damaged"
    storage.fetch(path, again=True)
    assert (path / "ticket.safetensors").read_bytes() == b"weights"
    assert sorted(child.name for child in path.iterdir()) == ["manifest.json", "ticket.safetensors"]
    assert [child.name for child in path.parent.iterdir()] == ["a"]


def test_what_is_nowhere_is_left_to_who_opens_it(sweeps):
    assert not storage.fetch(sweeps / "none").exists()
    here = ticket(sweeps / "a")  # Never uploaded.
    storage.fetch(here, again=True)
    assert (here / "manifest.json").exists()


def test_of_a_strangers_ticket_no_more_is_downloaded_than_a_ticket_holds(
    sweeps, tmp_path, monkeypatch
):
    ticket = sweeps / "first" / "tickets" / "strange"
    ticket.mkdir(parents=True)
    for name, size in (("manifest.json", 10), ("ticket.safetensors", 20), ("more", 10**6)):
        (ticket / name).write_bytes(bytes(size))
        storage.keep(ticket / name)
    monkeypatch.setenv("RAYTICKETS_WORK", str(tmp_path / "other"))
    largest = {"manifest.json": 10, "ticket.safetensors": 20}
    there = storage.local(storage.address(ticket))
    with pytest.raises(OSError, match=r"ticket\.safetensors has over 19 bytes"):
        storage.fetch(there, largest=largest | {"ticket.safetensors": 19})
    assert not there.exists()
    found = storage.fetch(there, largest=largest)
    assert sorted(path.name for path in found.iterdir()) == sorted(largest)


def test_a_folder_without_its_manifest_is_no_ticket(sweeps, tmp_path):
    path = ticket(sweeps / "a")
    storage.keep(path / "ticket.safetensors")
    assert not storage.fetch(elsewhere(path, tmp_path)).exists()
    storage.keep(path)
    assert (storage.fetch(elsewhere(path, tmp_path)) / "ticket.safetensors").exists()


def test_the_manifest_is_uploaded_last_and_removed_first(sweeps, monkeypatch):
    import obstore

    path, seen = ticket(sweeps / "a"), []
    (path / "z.bin").write_bytes(b"")
    put, delete = obstore.put, obstore.delete
    monkeypatch.setattr(obstore, "put", lambda s, k, f: (seen.append(k), put(s, k, f)))
    monkeypatch.setattr(obstore, "delete", lambda s, k: (seen.append(k), delete(s, k)))
    storage.keep(path)
    assert [key.rsplit("/")[-1] for key in seen] == [
        "ticket.safetensors",
        "z.bin",
        "manifest.json",
    ]
    seen.clear()
    storage.remove(path)
    assert seen[0].endswith("/a/manifest.json")
    assert not path.exists()
    assert storage.names(sweeps) == []


def test_a_file_is_kept_fetched_listed_and_removed(sweeps, tmp_path):
    old, new = (sweeps / "checkpoints" / name for name in ("00000001-a", "00000002-b"))
    beside = sweeps / "checkpoints" / "00000001-a2"
    old.parent.mkdir(parents=True)
    for path in (old, new, beside):
        path.write_bytes(path.name.encode())
        storage.keep(path)
    folder = elsewhere(old.parent, tmp_path)
    assert storage.names(folder) == ["00000001-a", "00000001-a2", "00000002-b"]
    assert storage.names(sweeps) == ["checkpoints"]
    assert storage.fetch(folder / new.name).read_bytes() == b"00000002-b"
    for _ in range(2):
        storage.remove(folder / old.name)
        assert storage.names(old.parent) == ["00000001-a2", "00000002-b"]
    storage.remove(folder)
    assert storage.names(sweeps) == []
    assert not folder.exists()


@pytest.mark.parametrize(
    ("here", "there", "newest"),
    [
        (None, b"1\n2\n", b"1\n2\n"),
        (b"1\n2\n3\n", None, b"1\n2\n3\n"),
        (b"1\n2\n3\n", b"1\n2\n", b"1\n2\n3\n"),
        (b"1\n", b"1\n2\n", b"1\n2\n"),
        (b"1\n2", b"1\n2\n3\n", b"1\n2\n3\n"),
        (b"1\n2\n3\n4\n", b"1\n2\nx\n", b"1\n2\nx\n"),
        (None, None, None),
    ],
)
def test_the_newest_journal_wins(here, there, newest, sweeps):
    path = sweeps / "first" / "journal.jsonl"
    path.parent.mkdir(parents=True)
    if there is not None:
        path.write_bytes(there)
        storage.keep(path)
        path.unlink()
    if here is not None:
        path.write_bytes(here)
    assert storage.fetch_journal(path) == path
    assert (path.read_bytes() if path.exists() else None) == newest


@pytest.fixture
def databases(sweeps, tmp_path):
    """One machine's copy of a database that it has uploaded, and another's, fetched from there."""
    here, there = sweeps / "study.db", elsewhere(sweeps / "study.db", tmp_path)
    here.parent.mkdir(parents=True)
    here.write_bytes(b"1")
    storage.keep_database(here)
    return here, storage.fetch_database(there)


def test_a_database_comes_from_where_it_was_uploaded_last(databases):
    here, there = databases
    assert there.read_bytes() == b"1"
    there.write_bytes(b"1, 2 there")
    storage.keep_database(there)
    assert storage.fetch_database(here).read_bytes() == b"1, 2 there"
    here.write_bytes(b"1, 2 there, 3 here")
    storage.keep_database(here)
    assert storage.fetch_database(there).read_bytes() == b"1, 2 there, 3 here"


def test_what_was_not_uploaded_of_a_database_stays_if_nobody_else_went_on_with_it(databases):
    here, there = databases
    undo = here.with_name("study.db-journal")
    for path in databases:
        path.write_bytes(b"1, 2 not uploaded")
        undo.touch()
        assert storage.fetch_database(path).read_bytes() == b"1, 2 not uploaded"
        assert undo.exists()
    storage.keep_database(there)
    here.write_bytes(b"1, 2 lost")
    assert storage.fetch_database(here).read_bytes() == b"1, 2 not uploaded"
    assert not undo.exists()  # It is of the file that was replaced.


@pytest.mark.parametrize("arrives", [True, False])
def test_an_upload_that_was_cut_off_is_not_taken_for_anothers(databases, monkeypatch, arrives):
    here, _ = databases
    here.write_bytes(b"1, 2")
    ask = storage._ask

    def cut_off(path, question):
        if arrives:
            ask(path, question)
        raise OSError("no answer")

    with monkeypatch.context() as silent:
        silent.setattr(storage, "_ask", cut_off)
        with pytest.raises(OSError, match="no answer"):
            storage.keep_database(here)
    here.write_bytes(b"1, 2, 3")
    assert storage.read(here)[0] == (b"1, 2" if arrives else b"1")
    assert storage.fetch_database(here).read_bytes() == b"1, 2, 3"


def test_a_database_that_was_never_uploaded_gives_way_to_one_that_was(databases):
    here, there = databases
    other = there.with_name("other.db")
    other.write_bytes(b"begun")
    assert storage.fetch_database(other).read_bytes() == b"begun"
    first = here.with_name("other.db")
    first.write_bytes(b"begun elsewhere")
    storage.keep_database(first)
    assert storage.fetch_database(other).read_bytes() == b"begun elsewhere"


def test_a_version_is_replaced_once(sweeps):
    path = sweeps / "lease.json"
    assert storage.read(path) is None
    first = storage.put_if(path, b"1", None)
    assert storage.read(path) == (b"1", first)
    with pytest.raises(storage.Changed, match=r"^s3://bucket/.*/lease.json$"):
        storage.put_if(path, b"another's 1", None)
    second = storage.put_if(path, b"2", first)
    assert storage.read(path) == (b"2", second)
    with pytest.raises(storage.Changed):
        storage.put_if(path, b"another's 2", first)
    assert storage.put_if(path, b"2", first) == second  # Its first answer was lost.
    storage.remove(path)
    with pytest.raises(storage.Changed):
        storage.put_if(path, b"3", second)
    assert not path.exists()


def test_a_store_that_does_not_answer_is_an_error_of_one_line(monkeypatch):
    settings = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "us-east-1"}
    credentials = {"AWS_ACCESS_KEY_ID": "AKIAKEY", "AWS_SECRET_ACCESS_KEY": "hidden"}
    for name, value in (settings | credentials).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_RETRIES", storage._RETRIES | {"max_retries": 1})
    path = storage.local("s3://bucket/sweeps")
    path.parent.mkdir(parents=True)
    path.touch()
    for call in (storage.keep, storage.names, storage.read, storage.remove):
        with pytest.raises(OSError, match=r"^s3://bucket/sweeps: ") as failed:
            call(path)
        assert "\n" not in str(failed.value)
        assert "AKIAKEY" not in str(failed.value)
        assert "hidden" not in str(failed.value)
    assert path.exists()


def test_ctrl_c_does_not_wait_for_the_store(monkeypatch):
    program = "from raytickets import storage; print(1, flush=True);"
    program += "storage.read(storage.local('s3://bucket/sweeps'))"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
            assert reader.stdout.readline() == b"1\n"
            asked, _ = silent.accept()
            reader.send_signal(signal.SIGINT)
            _, errors = reader.communicate(timeout=10)
            asked.close()
    assert errors.endswith(b"KeyboardInterrupt\n")


RACE = """
import sys
from pathlib import Path
from raytickets import storage
path, me, won = Path(sys.argv[1]), sys.argv[2], 0
print("ready", flush=True)
sys.stdin.readline()
while (found := storage.read(path)) is None or found[0].count(b"\\n") < 40:
    content, version = found or (b"", None)
    try:
        storage.put_if(path, content + f"{me}\\n".encode(), version)
        won += 1
    except storage.Changed:
        pass
print(won)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_one_of_twenty_processes_wins_each_version():
    path = storage.local("s3://bucket/race/lease.json")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(20)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    with ThreadPoolExecutor(20) as pool:
        won = [int(output) for output, _ in pool.map(lambda r: r.communicate(timeout=120), racers)]
    content, _ = storage.read(path)
    winners = content.decode().split()
    assert len(winners) == 40
    assert won == [winners.count(str(number)) for number in range(20)]
    assert sum(wins > 0 for wins in won) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_an_upload_that_is_cut_off_leaves_no_ticket(tmp_path):
    path = ticket(storage.local("s3://bucket/cut") / "a", os.urandom(100_000_000))
    (path / "first").touch()
    there = elsewhere(path, tmp_path)
    program = "import sys, pathlib; from raytickets import storage;"
    program += "storage.keep(pathlib.Path(sys.argv[1])); print('ended')"
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as uploader:
        deadline = time.monotonic() + 60
        while storage.names(there) != ["first"]:
            assert time.monotonic() < deadline
        uploader.kill()
        assert uploader.stdout.read() == ""
    assert storage.names(there) == ["first"]
    assert not storage.fetch(there).exists()
    storage.keep(path)
    assert storage.names(storage.fetch(there)) == ["first", "manifest.json", "ticket.safetensors"]


SPACE = """
from raytickets.config import *

def space():
    return SearchSpace(
        name="small",
        network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
        data=Data(),
        penalties=(1e-4, 1e-3),
        prune_ratios=(0.3, 0.5),
        training=Training(epochs=12),
        proof=Proof(budget=1),
        retraining=Retraining(epochs=4),
        winners=1,
    )
"""

PROPOSED = SPACE.replace("small", "proposed").replace(
    "winners=1,",
    """winners=1,
        optuna=Optuna(trajectories=6, ranges={"penalty": Range(1e-4, 1e-3)}, startup=4),""",
)


class Machine:
    """One with its own local copies, which share nothing with another's but the store."""

    def __init__(self, folder, server):
        folder.mkdir()
        (folder / "small.py").write_text(SPACE)
        (folder / "proposed.py").write_text(PROPOSED)
        work = {"RAYTICKETS_WORK": str(folder / "work"), "MLFLOW_TRACKING_URI": "sqlite:///ml.db"}
        self.folder, self.environment = folder, os.environ | server | work

    def start(self, *words, output=subprocess.PIPE):
        return subprocess.Popen(
            [Path(sys.executable).with_name("raytickets"), *words],
            cwd=self.folder,
            env=self.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words):
        """Exit code and output."""
        with self.start(*words) as process:
            output, _ = process.communicate(timeout=580)
        return process.returncode, output

    def report(self, sweep):
        code, output = self.run("report", f"s3://bucket/sweeps/{sweep}", "--json")
        assert code == 0, output
        return json.loads(output)

    def search(self, sweep, space="small.py"):
        return ("search", space, "--storage", "s3://bucket/sweeps", "--name", sweep)

    def copy(self, sweep):
        return self.folder / "work/raytickets/remote/s3/bucket/sweeps" / sweep

    def search_until(self, sweep, space, count, number):
        """Send the driver a signal once so many trajectories have ended, and wait for its end."""
        log, ended = self.folder / "output.txt", b'"event": "trajectory"'
        journal = self.copy(sweep) / NAME
        with log.open("w") as output, self.start(*self.search(sweep, space), output=output) as run:
            while not journal.exists() or journal.read_bytes().count(ended) < count:
                assert run.poll() is None, log.read_text()
                time.sleep(0.1)
            run.send_signal(number)
        return read_journal(self.copy(sweep))


@pytest.fixture(scope="module")
def machines(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    return Machine(folder / "one", server), Machine(folder / "two", server)


@pytest.fixture(scope="module")
def uninterrupted(machines):
    """The report of a sweep that machine one kept at an address."""
    one, _ = machines
    code, output = one.run(*one.search("first"))
    assert code == 0, output
    assert "s3://bucket/sweeps/first" in output
    return one.report("first")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("s3")
def test_a_sweep_at_an_address_is_read_elsewhere(uninterrupted, machines, server, monkeypatch):
    one, two = machines
    assert uninterrupted["state"] == "done"
    assert two.report("first") == uninterrupted
    code, output = two.run("history", "small", "--storage", "s3://bucket/sweeps")
    assert code == 0
    assert "first" in output
    (winner,) = uninterrupted["winners"]
    two.environment["RAYTICKETS_STORAGE"] = "s3://bucket/sweeps"
    code, output = two.run("show", winner["run"])
    assert code == 0, output
    del two.environment["RAYTICKETS_STORAGE"]
    monkeypatch.setenv("RAYTICKETS_WORK", two.environment["RAYTICKETS_WORK"])
    for path in (f"tickets/{winner['run']}", winner["path"]):
        ticket = load_ticket(f"s3://bucket/sweeps/first/{path}")
        assert ticket.path.is_relative_to(two.folder)
        ticket.network()
    secret = server["AWS_SECRET_ACCESS_KEY"].encode()
    for file in [*one.folder.rglob("*"), *two.folder.rglob("*")]:
        assert not file.is_file() or secret not in file.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("s3")
def test_a_killed_sweep_goes_on_elsewhere(uninterrupted, machines, monkeypatch):
    one, two = machines
    monkeypatch.setenv("RAYTICKETS_WORK", str(one.folder / "work"))
    sweep = storage.local("s3://bucket/sweeps/second")
    with (
        (one.folder / "output.txt").open("w") as output,
        one.start(*one.search("second"), output=output) as driver,
    ):
        while not storage.names(sweep / "tickets"):
            assert driver.poll() is None, (one.folder / "output.txt").read_text()
            time.sleep(0.1)
        driver.kill()
    content, version = storage.read(sweep / FILE)
    lease = json.loads(content) | {"process": None}  # As if it had run on another host.
    storage.put_if(sweep / FILE, json.dumps(lease).encode(), version)
    deadline = time.monotonic() + LIFE_S + SKEW_S + 30
    code, output = two.run(*two.search("second"))
    assert code == 4, output
    while code == 4 and time.monotonic() < deadline:
        time.sleep(5)
        code, output = two.run(*two.search("second"))
    assert code == 0, output
    found = two.report("second")
    assert one.report("second") == found
    for sweep in (found, uninterrupted):
        sweep["tickets"] = {ticket["ticket"] for ticket in sweep["tickets"]}
        del sweep["name"], sweep["trajectories"]
    assert found == uninterrupted


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("s3")
def test_a_study_is_gone_on_with_by_machines_in_turns(machines):
    """One is interrupted, then the other is killed, and the first one comes to the end."""
    one, two = machines
    seen = [
        *one.search_until("third", "proposed.py", 2, signal.SIGINT),
        *two.search_until("third", "proposed.py", 4, signal.SIGKILL),
    ]
    code, output = one.run(*one.search("third", "proposed.py"))
    assert code == 0, output
    ends = select(read_journal(one.copy("third")), "trajectory")
    before = {e["trajectory"]: e["changes"] for e in select(seen, "trajectory")}
    assert len(before) >= 4
    assert before.items() <= {e["trajectory"]: e["changes"] for e in ends}.items()
    assert len({e["trajectory"] for e in ends}) == len(ends)
    found = [e for e in ends if e["state"] != "failed"]
    assert len(found) == 6
    assert {e["trajectory"] for e in found} >= {*before}
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{one.copy('third')}/study.db")
    complete = {t.number: t.params for t in study.trials if t.state == TrialState.COMPLETE}
    assert complete == {point(e).number: e["changes"] for e in found}
