"""The command line: what each command prints, and the code it ends with."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import made_up_comparison
import pytest
from made_up_space import Failed, source, stand_in_for_ray
from made_up_sweep import (
    FINISHED,
    LOW,
    OPENING,
    SMALL,
    check,
    epoch,
    retrained,
    ticket,
    write,
)
from test_ticket import saved_ticket

from raytickets import storage
from raytickets.lease import Held, hold
from raytickets.spaces import built_in
from raytickets.sweep import Sweep


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a finished sweep in it, one of whose tickets is there."""
    path = tmp_path_factory.mktemp("made")
    sweep = path / "sweeps" / "first"
    saved = saved_ticket(sweep / "tickets")
    write(sweep, [*FINISHED, ticket(LOW, saved.id, 0.5, 350_000, 0.96)])
    return path, saved


@pytest.fixture
def found(made, monkeypatch):
    """That ticket, and its sweep's folder as the working folder."""
    path, saved = made
    monkeypatch.chdir(path)
    return saved


@pytest.mark.parametrize("given", ["first", "sweeps/first"])
@pytest.mark.usefixtures("found")
def test_report_is_found_by_name_or_folder(cli, given):
    code, output, errors = cli("report", given)
    assert (code, errors) == (0, "")
    assert output.startswith("first: done")
    assert SMALL in output


def test_report_as_json_is_what_the_library_gives(found, cli):
    code, output, _ = cli("report", "first", "--json")
    assert code == 0
    assert json.loads(output) == Sweep(found.path.parent.parent).report()


def test_show_is_found_by_id_or_folder(found, cli):
    by_id, by_folder = cli("show", found.id), cli("show", f"sweeps/first/tickets/{found.id}")
    assert by_id == by_folder
    code, output, errors = by_id
    assert (code, errors) == (0, "")
    assert f"Ticket {found.id}" in output
    assert "cifar_vgg depth=9 width=0.125" in output


def test_a_folder_that_may_not_be_read_hides_no_ticket(found, cli, monkeypatch):
    def names(path):
        if path == found.path.parent.parent.parent / "private" / "tickets":
            raise PermissionError(path)
        return ["first", "private"] if path.name == "sweeps" else storage.names(path)

    monkeypatch.setattr("raytickets.cli.names", names)
    assert cli("show", found.id)[0] == 0


def test_an_id_that_several_sweeps_have_needs_a_folder(found, refusal, monkeypatch, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(found.path, tmp_path / "sweeps" / name / "tickets" / found.id)
    monkeypatch.chdir(tmp_path)
    said = f"sweeps/first/tickets/{found.id}, sweeps/second/tickets/{found.id}"
    assert refusal("show", found.id).endswith(f"is in several sweeps: {said}")


def test_what_the_system_refuses_is_one_line(found, cli, monkeypatch):  # noqa: ARG001
    def unreadable(*_):
        raise PermissionError(13, "Permission denied", "journal.jsonl")

    monkeypatch.setattr(Sweep, "events", unreadable)
    code, output, errors = cli("report", "first")
    assert (code, output) == (3, "")
    assert errors == "raytickets: [Errno 13] Permission denied: 'journal.jsonl'\n"


def test_show_as_json_is_the_manifest(found, cli):
    code, output, _ = cli("show", found.id, "--json")
    assert code == 0
    assert json.loads(output) == found.manifest


def test_spaces_lists_what_comes_with_raytickets(cli):
    code, output, _ = cli("spaces")
    assert code == 0
    names = [line.split()[0] for line in output.splitlines()]
    assert names == [*built_in()]
    assert {"digits", "cifar10_vgg16", "imagenet_resnet50"} <= {*names}


def test_the_version_is_that_of_the_package(cli):
    assert cli("--version") == (0, f"{version('raytickets')}\n", "")


def test_help_names_every_command(cli):
    code, output, _ = cli("--help")
    assert code == 0
    for command in ["search", "compare", "report", "show", "retrain", "sync", "history", "spaces"]:
        assert f"• {command}" in output
    for code in ("0 all done", "2 bad input", "3 something failed", "4 another", "130 interrupted"):
        assert code in " ".join(output.split())


def test_an_altered_ticket_is_not_shown(found, refusal, tmp_path):
    path = shutil.copytree(found.path, tmp_path / "copy") / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert re.search(f"^ticket: '{path.parent}' .* altered", refusal("show", str(path.parent)))


def test_a_search_reports_what_it_found_and_where_to_look(folder, cli, monkeypatch):
    def run(plan, _, observer, **__):
        for event in FINISHED:
            observer(event)
        return Sweep(write(plan.folder, FINISHED))

    stand_in_for_ray(monkeypatch, run)
    words = ["search", "mine.py", "--name", "first", "--tracking-uri", "databricks"]
    code, output, errors = cli(*words)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0] == f"sweep first in {folder / 'sweeps' / 'first'}"
    assert "first: done" in output
    there = ["mlflow ui databricks", "http://databricks/mine"]
    assert [line.strip() for line in lines[-2:]] == there


@pytest.mark.usefixtures("folder")
def test_a_comparison_is_of_what_was_asked_for_and_shows_its_table(cli, monkeypatch):
    def run(plan, _, observer, **__):
        assert plan.opening["event"] == "comparison"
        assert plan.opening["methods"] == ["dense", "early_bird"]
        assert (plan.opening["seeds"], plan.opening["prune_ratios"]) == ([0, 1], [0.4])
        for event in made_up_comparison.finished():
            observer(event)
        return Sweep(write(plan.folder, made_up_comparison.finished()))

    stand_in_for_ray(monkeypatch, run)
    asked = ["--methods", "dense", "early_bird", "--seeds", "2", "--prune-ratios", "0.4"]
    code, output, errors = cli("compare", "mine.py", "--name", "duel", *asked)
    assert (code, errors) == (0, "")
    assert output.startswith("comparison duel in ")
    assert "duel: done" in output
    assert "early_bird beats random." in output
    code, output, _ = cli("report", "duel")
    assert code == 0
    assert "duel: done" in output


@pytest.mark.usefixtures("folder")
def test_a_source_that_fails_is_told_of_with_the_table_of_the_rest(cli, monkeypatch):
    def run(plan, *_, **__):
        write(plan.folder, made_up_comparison.finished()[:-1])
        raise Failed("a stage failed: early_bird-seed2: no heart")

    stand_in_for_ray(monkeypatch, run)
    code, output, errors = cli("compare", "mine.py", "--name", "duel")
    assert (code, errors) == (3, "raytickets: a stage failed: early_bird-seed2: no heart\n")
    assert "duel: unfinished" in output


def test_the_papers_numbers_are_shown_without_a_comparison(cli):
    code, output, _ = cli("compare", "paper")
    assert code == 0
    for words in (
        "VGG16 on CIFAR-100: Table 2",
        "72.17",
        "ResNet-18 on ImageNet",
        "68.28",
        "~93.8",
    ):
        assert words in output


def test_a_comparison_stands_beside_the_papers_numbers(cli, working_folder):
    first, *others = made_up_comparison.finished()
    changes = {"name": "cifar10_vgg16", "network": {"name": "cifar_vgg", "options": {"depth": 16}}}
    data = first["space"]["data"] | {"source": "cifar10", "path": "data"}
    opening = first | {"space": first["space"] | changes | {"data": data}}
    write(working_folder / "sweeps" / "duel", [opening, *others])
    code, output, _ = cli("compare", "paper", "--name", "duel")
    assert code == 0
    (line,) = [
        line
        for line in output.splitlines()
        if line.split()[:2] == ["0.3", "drawn"] and "20" in line
    ]
    assert line.split()[5:] == ["~93.3", "early_bird", "3", "98.17±0.58", "57%"]
    assert "CIFAR-100" not in output


@pytest.mark.usefixtures("folder")
def test_a_stage_that_fails_is_told_and_what_was_found_is_reported(cli, monkeypatch):
    def run(plan, *_, **__):
        write(plan.folder, FINISHED[:-1])
        raise Failed("a stage failed: the worker [/died]")

    stand_in_for_ray(monkeypatch, run)
    code, output, errors = cli("search", "mine.py", "--name", "first")
    assert (code, errors) == (3, "raytickets: a stage failed: the worker [/died]\n")
    assert "first: unfinished" in output


def test_what_is_owed_to_mlflow_is_delivered_under_the_lease(found, cli, monkeypatch):
    sweep = found.path.resolve().parent.parent

    class Undelivered(RuntimeError):
        pass

    def sync(path, uri):
        assert (path.resolve(), uri) == (sweep, "databricks")
        with pytest.raises(Held), hold(path):
            pytest.fail("it is not held")
        if silent:
            raise Undelivered("3 events did not reach MLflow")
        return 23, 7

    tracking = SimpleNamespace(sync=sync, Undelivered=Undelivered)
    monkeypatch.setitem(sys.modules, "raytickets.tracking", tracking)
    silent = False
    assert cli("sync", "first", "--tracking-uri", "databricks") == (
        *(0, "MLflow has all 23 events of first in 7 runs\n", ""),
    )
    silent = True
    assert cli("sync", "first", "--tracking-uri", "databricks") == (
        *(3, "", "raytickets: 3 events did not reach MLflow\n"),
    )
    with hold(sweep):
        assert cli("sync", "first", "--tracking-uri", "databricks")[0] == 4


def test_sweeps_are_where_the_environment_says(tmp_path):
    command = [sys.executable, "-m", "raytickets.cli", "history", "digits"]
    environment = os.environ | {"RAYTICKETS_STORAGE": "elsewhere"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("has no sweep in elsewhere\n")


def test_history_shows_the_sweeps_of_a_space(found, cli):
    sweep = found.path.resolve().parent.parent
    write(sweep.parent / "later", [*FINISHED[:-3], *FINISHED[-1:]])
    write(sweep.parent / "elsewhere", [OPENING | {"space": OPENING["space"] | {"name": "other"}}])
    code, output, errors = cli("history", "digits")
    assert (code, errors) == (0, "")
    shown = [line.split()[0] for line in output.splitlines() if line.strip()]
    assert "first" in shown
    assert "later" in shown
    assert "elsewhere" not in shown
    shutil.rmtree(sweep.parent / "later")
    shutil.rmtree(sweep.parent / "elsewhere")
    code, _, errors = cli("history", "nosuch")
    assert (code, errors) == (
        2,
        "raytickets: space: 'nosuch' is not allowed: has no sweep in sweeps\n",
    )


def test_a_ticket_is_retrained_with_what_was_asked_for(found, cli, monkeypatch):
    def retrain_ticket(path, **options):
        assert path == found.path.resolve()
        observer = options.pop("observer")
        assert options == {
            "epochs": 60,
            "weights": "reinit",
            "tracking_uri": None,
            "address": "auto",
        }
        observer(epoch(found.id, 60))
        return retrained(found.id, 350_000, 1, 0.975)

    stand_in_for_ray(monkeypatch, retrain_ticket)
    code, output, errors = cli(
        *("retrain", found.id, "--epochs", "60", "--weights", "reinit", "--address", "auto")
    )
    assert (code, errors) == (0, "")
    saved = found.path.resolve().parent.parent / "retrained" / found.id
    assert output.splitlines() == [
        f"retraining {found.id}  epoch 60/60  validation 97.0%",
        f"test accuracy 97.50%, saved as {saved}",
    ]


def test_a_ticket_of_a_comparison_is_retrained_too(found, cli, monkeypatch):
    """What is told first is the comparison's journal."""
    events = made_up_comparison.finished()
    sweep = write(found.path.parent.parent.parent / "duel", events)
    path = shutil.copytree(found.path, sweep / "tickets" / found.id)

    def retrain_ticket(_, observer, **__):
        for event in events:
            observer(event)
        observer(made_up_comparison.epoch("random", 0.3, 1, 5))
        return retrained(found.id, 350_000, 1, 0.975)

    stand_in_for_ray(monkeypatch, retrain_ticket)
    code, output, errors = cli("retrain", str(path), "--epochs", "5")
    shutil.rmtree(sweep)
    assert (code, errors) == (0, "")
    assert "retraining random at prune ratio 0.3, seed 1  epoch 5/5  validation 97.0%" in output


def test_a_retraining_that_fails_is_told(found, cli, monkeypatch):
    def retrain_ticket(*_, **__):
        raise Failed("retraining failed: the worker died")

    stand_in_for_ray(monkeypatch, retrain_ticket)
    assert cli("retrain", found.id) == (3, "", "raytickets: retraining failed: the worker died\n")


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["search", "mine.py"], r"raytickets search mine\.py --name mine-\d{8}-\d{6}"),
        (["search", "mine.py", "--name", "x"], r"raytickets search mine\.py --name x"),
        (["compare", "mine.py", "--seeds", "2"], ".* compare mine.py --seeds 2 --name mine-comp.*"),
        (["search", "mine.py", "--name=x"], r"raytickets search mine\.py --name=x"),
        (["search", "mine.py", "--name", "x", "--new"], r"raytickets search mine\.py --name x"),
        (["search", "mine.py", "--storage", "my disk"], ".* --storage 'my disk' --name mine-.*"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_an_interrupted_search_says_how_to_go_on(cli, monkeypatch, words, again):
    def run(*_, **__):
        raise KeyboardInterrupt

    stand_in_for_ray(monkeypatch, run)
    code, output, errors = cli(*words)
    assert (code, errors) == (130, "")
    assert re.fullmatch(again, output.splitlines()[-1].strip())


@pytest.mark.parametrize(("before", "code"), [(lambda *_: None, 130), (signal.SIG_IGN, 0)])
@pytest.mark.usefixtures("folder")
def test_a_hangup_is_an_interruption_unless_it_is_ignored(cli, monkeypatch, before, code):
    def run(plan, *_, **__):
        os.kill(os.getpid(), signal.SIGHUP)
        write(plan.folder, [plan.opening])
        return Sweep(plan.folder)

    stand_in_for_ray(monkeypatch, run)
    others = signal.signal(signal.SIGHUP, before)
    try:
        assert cli("search", "mine.py")[0] == code
    finally:
        signal.signal(signal.SIGHUP, others)


def begin(monkeypatch, told, plans):
    """A run that tells of these events and is then killed, or ends with the last of them."""

    def run(plan, *_, **__):
        plans.append(plan)
        write(plan.folder, [plan.opening, *told])
        return Sweep(plan.folder)

    stand_in_for_ray(monkeypatch, run)


DONE, FAILED = ({"event": "end", "state": state, "reason": ""} for state in ("done", "failed"))
TICK = ("search", "mine.py", "--name", "nightly", "--resume-or-start")


@pytest.mark.usefixtures("folder")
def test_a_series_goes_on_with_the_newest_sweep_until_it_is_over(cli, monkeypatch):
    plans = []
    for told in ([DONE], [], [FAILED], [FAILED], [DONE], [DONE]):
        begin(monkeypatch, told, plans)
        assert cli(*TICK)[0] == 0
    assert [plan.folder.name for plan in plans] == [
        "nightly-0001",
        *["nightly-0002"] * 3,  # cut off, then failed twice
        "nightly-0003",
        "nightly-0004",
    ]
    assert {plan.opening["series"] for plan in plans} == {"nightly"}
    assert len({plan.lease.token for plan in plans if plan.folder.name == "nightly-0002"}) == 3


def test_a_series_starts_its_next_sweep_with_a_space_that_changed(folder, cli, monkeypatch):
    plans = []
    begin(monkeypatch, [], plans)
    assert cli(*TICK)[0] == 0
    (folder / "mine.py").write_text(source(penalties="(1e-3,)"))
    assert cli(*TICK)[0] == 0
    assert [plan.folder.name for plan in plans] == ["nightly-0001", "nightly-0002"]
    assert plans[1].space.penalties == (1e-3,)


@pytest.mark.usefixtures("folder")
def test_two_of_one_name_or_series_never_run_at_once(cli, monkeypatch):
    begin(monkeypatch, [], [])
    storage = Path("sweeps").resolve()
    for held, words in (
        ("nightly", TICK),
        ("x", ("search", "mine.py", "--name", "x")),
        ("x", ("compare", "mine.py", "--name", "x")),
    ):
        with hold(storage / held):
            code, output, errors = cli(*words)
        assert (code, output) == (4, "")
        assert re.fullmatch(rf"raytickets: {held} is held by process \d+ on .* since .*\n", errors)
    assert cli(*TICK)[0] == 0
    with hold(storage / "nightly-0001"):
        code, _, errors = cli("search", "mine.py", "--name", "nightly-0001")
        assert (code, errors[:39]) == (4, "raytickets: nightly-0001 is held by pro")
    # Its study is that of the whole series.
    with hold(storage / "nightly"):
        code, _, errors = cli("search", "mine.py", "--name", "nightly-0001")
        assert (code, errors[:31]) == (4, "raytickets: nightly is held by ")


@pytest.mark.parametrize("more", [(), ("--name", "x", "--new")])
@pytest.mark.usefixtures("folder")
def test_a_series_has_a_name_and_goes_on(refusal, more):
    line = refusal("search", "mine.py", "--resume-or-start", *more)
    assert line.startswith("resume_or_start: True is not allowed: needs the --name of a series")


def test_starting_anew_keeps_what_was_there_and_says_so(folder, cli, monkeypatch):
    begin(monkeypatch, [], [])
    assert cli("search", "mine.py", "--name", "x")[0] == 0
    before = (folder / "sweeps/x/journal.jsonl").read_bytes()
    (folder / "mine.py").write_text(source(penalties="(1e-3,)"))
    code, _, errors = cli("search", "mine.py", "--name", "x")
    assert code == 2
    assert "this sweep began with another penalties; choose a new name, or start anew" in errors
    code, output, _ = cli("search", "mine.py", "--name", "x", "--new")
    assert code == 0
    (kept,) = (folder / "sweeps").glob("x-before-*")
    assert output.splitlines()[1] == f"what x held is kept in {kept}"
    assert (kept / "journal.jsonl").read_bytes() == before
    assert Sweep(folder / "sweeps/x").space().penalties == (1e-3,)


@pytest.mark.usefixtures("folder")
def test_a_sweep_that_goes_on_says_what_it_found(cli, monkeypatch):
    begin(monkeypatch, [check(LOW, 3.0, {"0.3": None})], [])
    assert cli("search", "mine.py", "--name", "x")[0] == 0
    begin(monkeypatch, [], [])
    _, output, _ = cli("search", "mine.py", "--name", "x")
    assert output.splitlines()[1] == (
        "found here: 0 trajectories ended, 0 tickets, 0 networks retrained;"
        " to go on: penalty0.0001-seed0 was at epoch 3"
    )


def test_a_journal_that_was_damaged_is_mended_at_the_start(folder, cli, monkeypatch):
    begin(monkeypatch, [DONE], [])
    assert cli("search", "mine.py", "--name", "x")[0] == 0
    journal = folder / "sweeps/x/journal.jsonl"
    journal.write_text(journal.read_text().replace('"state": "done"', '"state": "gone"'))
    code, _, errors = cli("report", "x")
    assert (code, errors.count("\n")) == (2, 1)
    assert "its journal is damaged: line 2 is damaged" in errors
    begin(monkeypatch, [], [])
    code, output, _ = cli("search", "mine.py", "--name", "x")
    assert code == 0
    assert output.splitlines()[1].startswith(f"line 2 of {journal} is damaged")


@pytest.mark.parametrize("fields", [{"prune_ratios": "(1.2,)"}, {"network": "Network('vgg16')"}])
def test_as_a_command_of_its_own(folder, fields):
    (folder / "mine.py").write_text(source(**fields))
    command = [sys.executable, "-m", "raytickets.cli", "search", "mine.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch("raytickets: .* is not allowed: .*\n", done.stderr)


def test_the_installed_command_is_this_one():
    installed = Path(sys.executable).parent / "raytickets"
    done = subprocess.run([installed, "spaces"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "digits" in done.stdout


@pytest.mark.slow
def test_ctrl_c_leaves_a_sweep_that_goes_on(tmp_path):
    """As in a terminal: Ctrl-C once a ticket is drawn, then the command that it prints."""
    started = [sys.executable, "-m", "raytickets.cli", "search", "digits", "--name", "cut"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["TERM"] = "dumb"
        os.execv(started[0], started)
    shown, journal = "", tmp_path / "sweeps/cut/journal.jsonl"
    while chunk := _read(terminal):
        shown += chunk
        if "\x03" not in shown and journal.exists() and '"event": "ticket"' in journal.read_text():
            os.write(terminal, b"\x03")
            shown += "\x03"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert "raytickets search digits --name cut" in shown
    drawn = set(re.findall(r'"ticket": "(\w+)"', journal.read_text()))
    subprocess.run(started, cwd=tmp_path, check=True, capture_output=True)
    report = Sweep(tmp_path / "sweeps/cut").report()
    assert report["state"] == "done"
    assert drawn <= {ticket["ticket"] for ticket in report["tickets"]}


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # how Linux tells that the other side is gone
        return ""
