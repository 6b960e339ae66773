"""What a sweep is going to do is settled, and refused, before Ray starts."""

import dataclasses
import json
import re
import socket
from types import SimpleNamespace

import pytest
from made_up_sweep import SPACE, write

from raytickets import plan as plans
from raytickets.config import (
    Comparison,
    Data,
    Halving,
    InputError,
    Network,
    Optuna,
    Proof,
    Range,
    StopRule,
    Training,
)
from raytickets.journal import Journal
from raytickets.lease import Held
from raytickets.plan import check_store, deadline_s, make_plan, opened, ray_address


@pytest.fixture
def space(image_folder):
    """A tiny network on noise, which is read in no time."""
    path = image_folder({"train/cat": 20, "train/dog": 20, "test/cat": 5, "test/dog": 6})
    small = dataclasses.replace(SPACE.training, batch_size=10)
    return dataclasses.replace(
        SPACE,
        data=Data("folder", str(path), validation=0.25),
        training=small,
        proof=Proof(batch_size=16),
        retraining=dataclasses.replace(SPACE.retraining, batch_size=16),
    )


PLUGIN = "mlflow.tracking_store", "arn"


def begun(space, storage, kind="sweep"):
    """A plan whose opening is in the journal, as after a first run."""
    plan = make_plan(space, name="first", storage=storage, kind=kind)
    journal = Journal(plan.folder)
    journal.append(plan.opening)
    journal.close()
    return plan


def test_the_opening_tells_of_network_and_data(space, tmp_path):
    plan = make_plan(space, name="first", storage=tmp_path / "sweeps")
    assert plan.folder == tmp_path / "sweeps" / "first"
    opening = plan.opening
    assert opening["name"] == "first"
    assert opening["space"] == space.as_dict()
    assert opening["fingerprint"] == space.fingerprint
    assert opening["data"] == {
        "fingerprint": plan.dataset.fingerprint,
        "train": 30,
        "validation": 10,
        "test": 11,
    }
    # VGG-9 of an eighth of the width has two stages each of 8, 16 and 32 channels.
    assert opening["channels"] == 2 * (8 + 16 + 32)
    convolutions = [(3, 8, 8), (8, 8, 8), (8, 16, 4), (16, 16, 4), (16, 32, 2), (32, 32, 2)]
    weights = [9 * reads * writes for reads, writes, _ in convolutions]
    assert opening["dense"]["macs"] == 32 * 2 + sum(
        weight * size**2 for weight, (_, _, size) in zip(weights, convolutions, strict=True)
    )
    assert opening["dense"]["params"] == sum(weights) + 2 * opening["channels"] + 32 * 2 + 2
    assert "torch" in opening["versions"]
    assert json.loads(json.dumps(opening)) == opening


def test_without_a_name_the_sweep_is_called_after_the_space_and_the_time(space, tmp_path):
    plan = make_plan(space, storage=tmp_path)
    assert plan.folder.name.startswith("digits-20")
    assert plan.opening["name"] == plan.folder.name


def test_the_same_space_under_the_same_name_goes_on(space, tmp_path):
    before = begun(space, tmp_path)
    again = make_plan(space, name="first", storage=tmp_path)
    assert again.opening == before.opening
    assert again.dataset.fingerprint == before.dataset.fingerprint


def test_a_sweep_that_goes_on_keeps_the_opening_of_its_first_run(space, tmp_path):
    before = begun(space, tmp_path)
    altered = before.opening | {"versions": {"torch": "1.0"}}
    (before.folder / "journal.jsonl").unlink()
    write(before.folder, [altered])
    assert make_plan(space, name="first", storage=tmp_path).opening == altered


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"penalties": (0.5,)}, "another penalties;"),
        ({"training": Training(epochs=9, batch_size=10)}, r"another training\.epochs;"),
        ({"network": Network("cifar_resnet")}, r"another network\.name, network\.options;"),
        (
            {"stop_rule": StopRule("paper"), "winners": 1},
            r"another stop_rule\.rule, stop_rule\.checks_per_epoch, winners;",
        ),
        ({"proof": Proof(rungs=3, batch_size=16)}, r"another proof\.rungs;"),
        ({"round_to": 16, "precision": "float32"}, "another round_to, precision;"),
        ({"halving": Halving()}, "another halving"),
    ],
)
def test_another_space_under_the_same_name_is_refused(space, tmp_path, changes, named):
    begun(space, tmp_path)
    changed = dataclasses.replace(space, **changes)
    with pytest.raises(InputError, match=f"^name: 'first' is not allowed: .*{named}"):
        make_plan(changed, name="first", storage=tmp_path)


def test_other_images_under_the_same_name_are_refused(space, tmp_path):
    begun(space, tmp_path)
    next((tmp_path / "images" / "train" / "cat").iterdir()).unlink()
    with pytest.raises(InputError, match=r"^data\.path: .*not those that the sweep began with"):
        make_plan(space, name="first", storage=tmp_path)


@pytest.mark.parametrize("recipe", ["training", "proof", "retraining"])
def test_a_batch_larger_than_the_training_images_is_refused(space, tmp_path, recipe):
    larger = dataclasses.replace(getattr(space, recipe), batch_size=32)
    with pytest.raises(InputError, match=rf"^{recipe}\.batch_size: 32 .* at most 30"):
        make_plan(dataclasses.replace(space, **{recipe: larger}), storage=tmp_path)


def test_more_checks_than_an_epoch_has_batches_are_refused(space, tmp_path):
    # 30 training images, of which a batch takes 10.
    often = dataclasses.replace(space, stop_rule=StopRule(checks_per_epoch=3))
    assert make_plan(often, storage=tmp_path).space == often
    often = dataclasses.replace(space, stop_rule=StopRule(checks_per_epoch=4))
    with pytest.raises(InputError, match=r"^stop_rule\.checks_per_epoch: 4 .* at most 3, the b"):
        make_plan(often, storage=tmp_path)


def proposed(space, ranges, **settings):
    settings = Optuna(trajectories=4, ranges=ranges, **settings)
    return dataclasses.replace(space, penalties=(1e-4,), optuna=settings)


def test_what_optuna_may_propose_can_be_used(space, tmp_path):
    ranges = {
        "penalty": Range(1e-5, 1e-3, log=True),
        "training.epochs": Range(5, 30),
        "training.schedule": ("constant", "cosine"),
        "stop_rule.window": (2, 4),
        "network.options.width": Range(0.1, 0.2),
    }
    plan = make_plan(proposed(space, ranges), name="first", storage=tmp_path)
    assert plan.space.optuna.ranges == ranges
    assert [file.name for file in plan.folder.iterdir()] == []


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ({"penalty": Range(-1.0, 1.0)}, r"'penalty=-1\.0' .* penalties must be a finite number"),
        ({"training.momentum": Range(0.5, 1.0)}, r"'training\.momentum=1\.0' .* below 1"),
        ({"training.epochs": Range(5.0, 9.0)}, r"'training\.epochs=5\.0' .* a whole number"),
        (
            {"training.schedule": ("cosine", "slow")},
            r"'training\.schedule='slow'' .* must be one of",
        ),
        ({"training.patience": (1, 2)}, r"'training\.patience' .* must be penalty, training"),
        ({"winners": (1, 2)}, r"'winners' .* must be penalty, training"),
        ({"network.options.width": Range(0.0, 1.0)}, r"'network\.options\.width=0\.0' .* above 0"),
        ({"network.options.depth": (9, 10)}, r"'network\.options\.depth=10' .* must be one of 9"),
        ({"network.options.colour": ("red",)}, r"'network\.options\.colour='red'' .*'colour'"),
        ({"training.batch_size": Range(8, 31)}, r"'training\.batch_size=31' .* at most 30"),
        (
            {"training.epochs": Range(5, 30), "stop_rule.window": Range(2, 11)},
            r"'training\.epochs=5, stop_rule\.window=11' .* enough for stop_rule\.window",
        ),
        (
            {"training.batch_size": Range(5, 15), "stop_rule.checks_per_epoch": Range(1, 3)},
            r"'training\.batch_size=15, stop_rule\.checks_per_epoch=3' .* the batches of an epoch",
        ),
    ],
)
def test_what_optuna_may_not_propose_is_refused_by_name(space, tmp_path, ranges, said):
    with pytest.raises(InputError) as refused:
        make_plan(proposed(space, ranges), storage=tmp_path)
    assert re.match(rf"optuna\.ranges: {said}", str(refused.value).replace('"', "'"))


def test_a_database_that_does_not_open_is_refused(space, tmp_path):
    ranges = {"penalty": Range(1e-5, 1e-3)}
    elsewhere = proposed(space, ranges, storage=f"sqlite:///{tmp_path}/study.db")
    make_plan(elsewhere, storage=tmp_path)
    nowhere = proposed(space, ranges, storage="sqlite:////nowhere/study.db")
    with pytest.raises(InputError, match=r"^optuna\.storage: 'sqlite:////nowhere/study\.db'"):
        make_plan(nowhere, storage=tmp_path)


def test_a_refused_sweep_leaves_no_folder_behind(space, tmp_path):
    refused = dataclasses.replace(space, network=Network("vgg16"))
    with pytest.raises(InputError):
        make_plan(refused, name="first", storage=tmp_path / "sweeps")
    assert not (tmp_path / "sweeps" / "first").exists()


def test_a_refusal_leaves_what_was_in_the_folder(space, tmp_path):
    kept = begun(space, tmp_path).folder / "journal.jsonl"
    before = kept.read_text()
    with pytest.raises(InputError):
        make_plan(dataclasses.replace(space, winners=1), name="first", storage=tmp_path)
    assert kept.read_text() == before


def test_a_disk_without_room_is_refused_before_anything_starts(space, tmp_path, monkeypatch):
    def left(megabytes):
        monkeypatch.setattr(
            plans.shutil, "disk_usage", lambda _: SimpleNamespace(free=megabytes * 1e6)
        )

    left(101)
    with pytest.raises(InputError, match=r"^storage: .* needs about 102 MB .* has 101 MB left"):
        make_plan(space, name="first", storage=tmp_path)
    assert not (tmp_path / "first").exists()
    left(103)
    begun(space, tmp_path)
    left(101)
    make_plan(space, name="first", storage=tmp_path)
    left(99)
    with pytest.raises(InputError, match="has 99 MB left"):
        make_plan(space, name="first", storage=tmp_path)


def test_a_refused_start_leaves_no_lease_behind(space, tmp_path):
    refused = dataclasses.replace(space, network=Network("vgg16"))
    with pytest.raises(InputError), opened(refused, name="first", storage=tmp_path / "sweeps"):
        pytest.fail("it was not refused")
    assert not (tmp_path / "sweeps" / "first").exists()


def test_a_plan_that_is_opened_holds_the_lease(space, tmp_path):
    with opened(space, name="first", storage=tmp_path) as plan:
        assert plan.lease.token == 1
        with pytest.raises(Held), opened(space, name="first", storage=tmp_path):
            pytest.fail("two hold it")


def test_a_refusal_of_starting_anew_moves_nothing(space, tmp_path):
    kept = begun(space, tmp_path).folder / "journal.jsonl"
    refused = dataclasses.replace(space, network=Network("vgg16"))
    with pytest.raises(InputError):
        make_plan(refused, name="first", storage=tmp_path, new=True)
    assert kept.exists()


def test_starting_anew_that_was_killed_goes_on_into_the_same_folder(space, tmp_path):
    whole, half = (tmp_path / f"first-before-20260101-00000{second}" for second in (1, 2))
    write(whole, [{"event": "sweep"}])
    (half / "tickets").mkdir(parents=True)
    (begun(space, tmp_path).folder / "retrained").mkdir()
    plan = make_plan(space, name="first", storage=tmp_path, new=True)
    assert plan.notes == (f"what first held is kept in {half}",)
    assert {path.name for path in half.iterdir()} == {"tickets", "retrained", "journal.jsonl"}
    assert [path.name for path in whole.iterdir()] == ["journal.jsonl"]
    assert {*tmp_path.glob("first-before-*")} == {whole, half}


def test_starting_anew_takes_the_place_of_nothing_that_was_kept(space, tmp_path):
    kept = tmp_path / "first-before-20260101-000001/tickets/one"
    kept.mkdir(parents=True)
    (begun(space, tmp_path).folder / "tickets" / "two").mkdir(parents=True)
    make_plan(space, name="first", storage=tmp_path, new=True)
    assert [path.name for path in kept.parent.iterdir()] == ["one"]
    (other,) = {*tmp_path.glob("first-before-*")} - {kept.parent.parent}
    assert {path.name for path in other.iterdir()} == {"tickets", "journal.jsonl"}


def test_a_series_starts_its_next_sweep_with_images_that_changed(space, tmp_path):
    with opened(space, name="nights", storage=tmp_path, series=True) as plan:
        write(plan.folder, [plan.opening])
    with opened(space, name="nights", storage=tmp_path, series=True) as plan:
        assert plan.folder.name == "nights-0001"
    next((tmp_path / "images" / "train" / "cat").iterdir()).unlink()
    with opened(space, name="nights", storage=tmp_path, series=True) as plan:
        assert plan.folder.name == "nights-0002"


def test_the_opening_of_a_comparison_tells_what_it_comes_to(space, tmp_path):
    asked = Comparison(methods=("dense", "early_bird"), prune_ratios=(0.4,), seeds=(3, 4))
    space = dataclasses.replace(space, penalties=(1e-2, 1e-4, 1e-3), comparison=asked)
    plan = make_plan(space, name="duel", storage=tmp_path, kind="comparison")
    opening = plan.opening
    assert (opening["event"], opening["penalty"]) == ("comparison", 1e-3)
    assert (opening["prune_ratios"], opening["seeds"]) == ([0.4], [3, 4])
    assert opening["methods"] == ["dense", "early_bird"]


def test_a_comparison_says_so_in_its_name(space, tmp_path):
    plan = make_plan(space, storage=tmp_path, kind="comparison")
    assert re.fullmatch(r"digits-comparison-\d{8}-\d{6}", plan.folder.name)


@pytest.mark.parametrize(("kind", "other"), [("sweep", "comparison"), ("comparison", "sweep")])
def test_a_name_is_of_a_sweep_or_of_a_comparison(space, tmp_path, kind, other):
    begun(space, tmp_path, kind)
    assert make_plan(space, name="first", storage=tmp_path, kind=kind).opening["event"] == kind
    with pytest.raises(
        InputError, match=f"name: 'first' .* it is a {kind}'s, and this is a {other}"
    ):
        make_plan(space, name="first", storage=tmp_path, kind=other)


@pytest.mark.parametrize(("given", "seconds"), [("0", 0), ("2.5", 2.5), ("1e3", 1000)])
def test_the_deadline_is_what_the_environment_says(monkeypatch, given, seconds):
    monkeypatch.setenv("RAYTICKETS_DEADLINE_S", given)
    assert deadline_s() == seconds


@pytest.mark.parametrize("given", ["soon", "-1", "inf", "nan", ""])
def test_a_deadline_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv("RAYTICKETS_DEADLINE_S", given)
    with pytest.raises(InputError, match=f"^RAYTICKETS_DEADLINE_S: '{given}' .* at least 0"):
        deadline_s()


def test_ray_is_where_it_is_said_to_be(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address(None) == ("RAY_ADDRESS", "local")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", there)
        assert ray_address(None) == ("RAY_ADDRESS", there)
        assert ray_address("auto") == ("address", "auto")
    with pytest.raises(InputError, match=r"^RAY_ADDRESS: .* no Ray cluster answers"):
        ray_address(None)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://127.0.0.1:10001", "must be auto or host:port; from elsewhere: ray job submit"),
        ("localhost", "must be auto or host:port"),
        ("[::1:6379", "no Ray cluster answers"),
        ("127.0.0.1:none", "no Ray cluster answers"),
        ("nowhere.invalid:6379", "no Ray cluster answers"),
    ],
)
def test_an_address_where_no_ray_can_be_is_refused(address, said):
    with pytest.raises(InputError, match=f"^address: .* {said}"):
        ray_address(address)


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///{}/mlflow.db",
        "sqlite:///{}/new/runs/mlflow.db",
        "postgresql+psycopg://me:hidden@host/mlflow",
        "https://me:hidden@host/mlflow",
        "databricks",
    ],
)
def test_a_store_that_mlflow_may_be_able_to_use(tmp_path, uri):
    check_store(uri.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://me:hidden@host?token=hidden", r"'ftp://\*\*\*@host' .* must be a database"),
        ("./mlruns", "must be a database or a server, as sqlite:///mlflow.db"),
        ("sqlite://", "a file is missing"),
        ("sqlite:///", "a file is missing"),
        ("sqlite:///{}", "Is a directory"),
        ("sqlite:///{}/file/mlflow.db", "Not a directory"),
        ("sqlite:////proc/mlflow.db", "/proc"),
        ("http://", "no host"),
        ("https://:5000/mlflow", "no host"),
        ("http://host:port", "'http:...' .* must be an address"),
        ("https://me:hidden?x@host", "'https:...' .* must be an address"),
        ("https://[hidden", "'https:...' .* must be an address"),
    ],
)
def test_a_store_that_no_mlflow_can_use_is_refused(tmp_path, monkeypatch, uri, said):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(tmp_path))
    with pytest.raises(InputError, match=f"^tracking_uri: .*{said}") as refused:
        check_store(None)
    assert "hidden" not in str(refused.value)


def test_folders_and_plugins_are_stores_where_mlflow_takes_them(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_store("./mlruns")
    check_store("file:///mlruns")
    monkeypatch.setattr(plans, "entry_points", lambda group, name: (group, name) == PLUGIN)
    check_store("arn:aws:mlflow")
    with pytest.raises(InputError):
        check_store("ftp://host")
