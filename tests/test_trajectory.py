"""A trajectory draws a ticket for every prune ratio, or says why not."""

import dataclasses
import math
import subprocess
import sys
from itertools import chain

import pytest
import torch
from torch import nn

from raytickets import checkpoint, cost, train, trajectory
from raytickets.config import Data, Network, Proof, Retraining, SearchSpace, StopRule, Training
from raytickets.data import load_data
from raytickets.journal import Journal
from raytickets.sweep import select
from raytickets.ticket import load_ticket
from raytickets.trajectory import Point, grid, prepare, run_trajectory

SPACE = SearchSpace(
    name="tiny",
    network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
    data=Data("digits", limit=256),
    penalties=(1e-3,),
    prune_ratios=(0.3, 0.6),
    training=Training(epochs=20, learning_rate=0.05, batch_size=32),
    proof=Proof(budget=0.5, batch_size=32),
    round_to=1,
    retraining=Retraining(epochs=2, batch_size=32),
)


@pytest.fixture(scope="module")
def dataset():
    return load_data(SPACE.data)


def events_of(space, dataset, folder, seed=0):
    point, setting = Point(space.penalties[0], seed), prepare(space, dataset, folder)
    return [event for events in run_trajectory(setting, point) for event in events]


@pytest.fixture(scope="module")
def drawn(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, events_of(SPACE, dataset, folder)


def test_one_trajectory_draws_every_ratio_and_then_ends(drawn):
    _, events = drawn
    tickets, (end,) = select(events, "ticket"), select(events, "trajectory")
    assert sorted(ticket["prune_ratio"] for ticket in tickets) == [0.3, 0.6]
    assert end["state"] == "drawn"
    assert end["ratios"] == {"0.3": "drawn", "0.6": "drawn"}
    assert end["epochs"] == max(ticket["draw_epoch"] for ticket in tickets) <= 20
    assert events[-1] is end


def test_the_end_tells_of_the_distances_between_all_masks(drawn):
    _, events = drawn
    (end,), checks = select(events, "trajectory"), select(events, "check")
    assert (end["method"], end["changes"]) == ("early_bird", {})
    matrix = end["distances_matrix"]
    assert matrix["epochs"] == [check["epoch"] for check in checks]
    for ratio in ("0.3", "0.6"):
        rows = matrix["ratios"][ratio]
        assert len(rows) == len(checks)
        window = SPACE.stop_rule.window
        for place in range(window - 1, len(checks)):
            farthest = max(rows[place][place - window + 1 : place])
            assert farthest == pytest.approx(checks[place]["distances"][ratio], abs=1e-3)


def test_a_point_with_changes_says_what_it_changed(dataset, tmp_path):
    changes = {"training.epochs": 5, "network.options.width": 0.25}
    point = Point(1e-3, 0, number=7, changes=changes)
    events = [e for some in run_trajectory(prepare(SPACE, dataset, tmp_path), point) for e in some]
    (end,) = select(events, "trajectory")
    assert (end["trajectory"], end["changes"]) == ("trial7-seed0", changes)
    assert end["distances_matrix"]["epochs"] == [1, 2, 3, 4, 5]


def test_no_ratio_draws_before_the_window_is_full(drawn):
    _, events = drawn
    window = SPACE.stop_rule.window
    for check in select(events, "check"):
        assert (check["distances"]["0.3"] is None) == (check["check"] < window)


def test_the_ticket_on_disk_is_the_network_that_was_proved(drawn, dataset):
    folder, events = drawn
    for event in select(events, "ticket"):
        ticket = load_ticket(folder / event["path"])
        network, manifest = ticket.network(), ticket.manifest
        assert ticket.id == event["ticket"]
        assert manifest["method"] == event["method"] == "early_bird"
        assert cost.macs(network, dataset.shape.example()) == manifest["macs"] == event["macs"]
        assert cost.params(network) == manifest["params"] == event["params"]
        assert manifest["draw"] == {"check": event["draw_check"], "epoch": event["draw_epoch"]}
        assert max(manifest["stop_rule"]["distances"]) == event["mask_distance"] <= 0.2
        assert manifest["data"]["fingerprint"] == dataset.fingerprint
        kept = sum(count for count, _ in event["kept"].values())
        total = sum(width for _, width in event["kept"].values())
        assert kept / total == pytest.approx(1 - event["prune_ratio"], abs=0.03)


def test_the_ledger_counts_three_forward_passes_a_sample(drawn, dataset):
    _, events = drawn
    dense = events_dense_macs(dataset)
    samples = len(dataset.train) // 32 * 32
    for check in select(events, "check"):
        assert check["train_macs"] == 3 * dense * samples * check["epoch"]
    for ticket in select(events, "ticket"):
        # As many whole batches as half an epoch of the dense network would have paid for.
        left = 3 * dense * len(dataset.train) * 0.5 - ticket["proof_macs"]
        assert 0 <= left < 3 * ticket["macs"] * 32


def events_dense_macs(dataset):
    from raytickets.models import build_network

    network = build_network(SPACE.network, in_channels=1, num_classes=10, seed=0)
    return cost.macs(network, dataset.shape.example())


def test_the_same_space_gives_the_same_tickets(drawn, dataset, tmp_path):
    _, events = drawn
    ids = [event["ticket"] for event in select(events, "ticket")]
    again = [event["ticket"] for event in select(events_of(SPACE, dataset, tmp_path), "ticket")]
    other = select(events_of(SPACE, dataset, tmp_path, seed=1), "ticket")
    assert ids == again
    assert not set(ids) & {event["ticket"] for event in other}


def test_other_ratios_do_not_change_a_ticket(drawn, dataset, tmp_path):
    """Sharing a trajectory costs nothing: a ratio draws alone what it draws in company."""
    _, events = drawn
    alone = dataclasses.replace(SPACE, prune_ratios=(0.6,))
    (ticket,) = select(events_of(alone, dataset, tmp_path), "ticket")
    (shared,) = [e for e in select(events, "ticket") if e["prune_ratio"] == 0.6]
    weights = [
        load_ticket(folder / event["path"]).network().state_dict()
        for folder, event in ((tmp_path, ticket), (drawn[0], shared))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_ratio_that_does_not_converge_is_reported_and_not_forced(dataset, tmp_path):
    strict = StopRule(threshold=1e-9)
    training = dataclasses.replace(SPACE.training, epochs=6)
    space = dataclasses.replace(SPACE, stop_rule=strict, training=training)
    events = events_of(space, dataset, tmp_path)
    (end,) = select(events, "trajectory")
    assert end["state"] == "not converged"
    assert end["ratios"] == {"0.3": "not converged", "0.6": "not converged"}
    assert not select(events, "ticket")
    assert not (tmp_path / "tickets").exists()


def test_a_trajectory_that_diverges_says_so_and_draws_nothing(dataset, tmp_path):
    training = dataclasses.replace(SPACE.training, learning_rate=1e20)
    events = events_of(dataclasses.replace(SPACE, training=training), dataset, tmp_path)
    (end,) = events
    assert end["state"] == "diverged"
    assert "nan" in end["reason"] or "inf" in end["reason"]
    assert end["ratios"] == {"0.3": "diverged", "0.6": "diverged"}
    journal = Journal(tmp_path)
    journal.append(end)  # every event is JSON, whatever happened


def test_the_first_mask_never_enters_the_window(dataset, tmp_path, monkeypatch):
    """All gammas start equal, so that mask keeps nothing and lies far from every other."""
    seen = []
    original = trajectory.MaskWindow.check

    def check(self, scores):
        seen.append(scores.clone())
        return original(self, scores)

    monkeypatch.setattr(trajectory.MaskWindow, "check", check)
    events = events_of(SPACE, dataset, tmp_path)
    assert len(seen) == len(select(events, "check"))
    assert all(scores.std() > 0 for scores in seen)


def test_the_paper_rule_looks_at_every_gamma(dataset, tmp_path, monkeypatch):
    lengths = set()
    original = trajectory.MaskWindow.check

    def check(self, scores):
        lengths.add(len(scores))
        return original(self, scores)

    monkeypatch.setattr(trajectory.MaskWindow, "check", check)
    resnet = Network("cifar_resnet", {"depth": 8, "width": 4})
    training = dataclasses.replace(SPACE.training, epochs=5)
    space = dataclasses.replace(
        SPACE, network=resnet, training=training, stop_rule=StopRule("paper")
    )
    events_of(space, dataset, tmp_path)
    from raytickets.models import build_network
    from raytickets.train import scale_parameters

    network = build_network(resnet, in_channels=1, num_classes=10, seed=0)
    assert lengths == {sum(len(scale) for scale in scale_parameters(network))}


def test_the_floor_keeps_a_group_alive_and_the_manifest_says_where(dataset, tmp_path):
    loose = StopRule("paper", threshold=0.99)
    space = dataclasses.replace(SPACE, prune_ratios=(0.97,), stop_rule=loose, min_channels=2)
    (event,) = select(events_of(space, dataset, tmp_path), "ticket")
    acted_on = load_ticket(tmp_path / event["path"]).manifest["min_channels"]["acted_on"]
    assert min(kept for kept, _ in event["kept"].values()) >= 2
    assert acted_on
    assert all(event["kept"][name][0] == 2 for name in acted_on)


ALONE = """
import sys
from pathlib import Path
from raytickets import load_space
from raytickets.data import load_data
from raytickets.trajectory import Point, prepare, run_trajectory
space = load_space("digits")
setting = prepare(space, load_data(space.data), Path(sys.argv[1]))
assert sum(len(events) for events in run_trajectory(setting, Point(1e-3, 0))) > 5
print(*({"torch._dynamo", "torchvision", "ray", "mlflow", "sklearn"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_a_trajectory_imports_nothing_that_it_can_do_without(tmp_path):
    """Each of these would cost every new worker seconds."""
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_grid_has_a_trajectory_for_each_penalty_and_seed():
    space = dataclasses.replace(SPACE, penalties=(1e-4, 1e-3), seeds=(0, 1))
    points = grid(space)
    assert len({point.id for point in points}) == len(points) == 4
    assert math.isclose(points[0].penalty, 1e-4)


def test_checks_within_an_epoch_draw_within_an_epoch(dataset, tmp_path):
    rule = StopRule(checks_per_epoch=4)
    events = events_of(dataclasses.replace(SPACE, stop_rule=rule), dataset, tmp_path)
    checks = select(events, "check")
    batches = len(dataset.train) // 32
    assert [check["epoch"] for check in checks[:4]] == [
        batches * place // 4 / batches for place in (1, 2, 3, 4)
    ]
    for check in checks:
        assert (check["validation_accuracy"] is None) == (check["epoch"] % 1 > 0)
        assert (check["distances"]["0.3"] is None) == (check["check"] < 5)
    for ticket in select(events, "ticket"):
        draw = load_ticket(tmp_path / ticket["path"]).manifest["draw"]
        assert draw == {"check": ticket["draw_check"], "epoch": ticket["draw_epoch"]}
        assert draw["epoch"] == checks[draw["check"] - 1]["epoch"]
    assert any(ticket["draw_epoch"] % 1 for ticket in select(events, "ticket"))


def test_more_checks_do_not_change_the_training(drawn, dataset, tmp_path):
    """The same weights after the same epochs, whatever looked at them in between."""
    rule = StopRule(checks_per_epoch=3, threshold=1e-9)
    training = dataclasses.replace(SPACE.training, epochs=3)
    space = dataclasses.replace(SPACE, stop_rule=rule, training=training)
    often = select(events_of(space, dataset, tmp_path), "check")
    seldom = select(drawn[1], "check")
    accuracies = [check["validation_accuracy"] for check in often if check["epoch"] % 1 == 0]
    assert accuracies == [check["validation_accuracy"] for check in seldom[:3]]


def test_widths_are_rounded_up_and_the_manifest_has_both_masks(dataset, tmp_path):
    space = dataclasses.replace(SPACE, round_to=8)
    (event, *_) = select(events_of(space, dataset, tmp_path), "ticket")
    ticket = load_ticket(tmp_path / event["path"])
    assert ticket.manifest["round_to"] == 8
    rounded = 0
    for group in ticket.manifest["groups"]:
        kept, chosen = group["mask"].count("1"), group["cut"].count("1")
        assert kept % 8 == 0
        assert chosen <= kept
        assert all(m == "1" for m, c in zip(group["mask"], group["cut"], strict=True) if c == "1")
        rounded += kept - chosen
    assert rounded
    assert cost.params(ticket.network()) == event["params"]


def test_a_trajectory_is_about_to_draw_when_a_distance_is_near_the_limit(drawn):
    _, events = drawn
    last = {"0.3": False, "0.6": False}
    draws = {f"{e['prune_ratio']:g}": e["draw_check"] for e in select(events, "ticket")}
    for check in select(events, "check"):
        near = [
            ratio
            for ratio, distance in check["distances"].items()
            if distance is not None and distance <= 0.4 and check["check"] <= draws[ratio]
        ]
        assert check["about_to_draw"] == bool(near)
        last |= dict.fromkeys(near, True)
    assert all(last.values())


def with_dropout(*, num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(12, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


LOW = {"dtype": torch.bfloat16, "weights": torch.bfloat16}
SHORT = dataclasses.replace(
    SPACE,
    data=dataclasses.replace(SPACE.data, limit=128),
    training=dataclasses.replace(SPACE.training, epochs=8),
    stop_rule=StopRule(threshold=0.5),
)
STOPPED = {
    "plain": ({}, {}),
    "bfloat16": ({"prune_ratios": (0.6,)}, LOW),
    "within": ({"stop_rule": StopRule(threshold=0.5, checks_per_epoch=2)}, {}),
    "epi": ({"stop_rule": StopRule("epi", 3, threshold=0.5)}, {}),
    "dropout": (
        {
            "network": Network("test_trajectory:with_dropout"),
            "stop_rule": StopRule(threshold=0.5, checks_per_epoch=2),
        },
        {},
    ),
}


def setting_of(space, dataset, folder, how=None):
    setting = prepare(space, dataset, folder)
    return dataclasses.replace(
        setting, numerics=dataclasses.replace(setting.numerics, **(how or {}))
    )


def timeless(lists):
    """The events of the lists, but for what differs from run to run."""
    return [
        {name: value for name, value in event.items() if name != "seconds"}
        for events in lists
        for event in events
    ]


def stopped(setting, lists, point=None):
    """What a trajectory yields until it is stopped after so many lists."""
    steps = run_trajectory(setting, point or Point(1e-3, 0))
    told = [next(steps) for _ in range(lists)]
    steps.close()
    return told


def stopped_again_and_again(name, tmp_path, every):
    changes, how = STOPPED[name]
    space = dataclasses.replace(SHORT, **changes)
    dataset = load_data(space.data)
    whole = list(run_trajectory(setting_of(space, dataset, tmp_path / "a", how), Point(1e-3, 0)))
    assert whole[-1][-1]["event"] == "trajectory"
    assert select(chain.from_iterable(whole), "ticket")
    setting = setting_of(space, dataset, tmp_path / "b", how)
    for lists in [*range(every, len(whole), every), len(whole)]:
        torch.rand(lists)  # whatever else the process has drawn
        told = stopped(setting, lists)
        assert timeless(told) == timeless(whole[:lists])
    seconds = [event["seconds"] for event in select(chain.from_iterable(told), "check")]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("name", STOPPED)
def test_a_trajectory_that_was_stopped_is_as_one_that_never_was(tmp_path, name):
    stopped_again_and_again(name, tmp_path, every=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
def test_a_trajectory_stopped_after_every_check_is_as_one_that_never_was(tmp_path, name):
    stopped_again_and_again(name, tmp_path, every=1)


def dying(fit, parts, trained):
    """`fit` that dies after it has trained one part more than these."""

    def until_then(*given, **options):
        for number, part in enumerate(fit(*given, **options), start=1):
            trained.append(part[0])
            if number > parts:
                raise InterruptedError
            yield part

    return until_then


@pytest.mark.parametrize("name", STOPPED)
def test_a_trajectory_that_died_within_an_epoch_is_as_one_that_never_was(
    tmp_path, name, monkeypatch
):
    monkeypatch.setattr(train, "PART", 1)
    changes, how = STOPPED[name]
    space = dataclasses.replace(SHORT, **changes)
    dataset, trained, deaths = load_data(space.data), [], 0
    monkeypatch.setattr(trajectory, "fit", dying(train.fit, 1000, trained))
    whole = list(run_trajectory(setting_of(space, dataset, tmp_path / "a", how), Point(1e-3, 0)))
    parts = len(trained)
    setting, told = setting_of(space, dataset, tmp_path / "b", how), None
    monkeypatch.setattr(checkpoint, "INTERVAL_S", 0)
    monkeypatch.setattr(trajectory, "fit", dying(train.fit, 4, trained))
    while told is None:
        try:
            told = list(run_trajectory(setting, Point(1e-3, 0)))
        except InterruptedError:
            deaths += 1
    assert timeless(told) == timeless(whole)
    assert deaths >= 2
    assert len(trained) == 2 * parts + deaths  # Every death repeats a part.


@pytest.fixture(scope="module")
def few():
    return load_data(SHORT.data)


def test_going_on_trains_only_what_is_left(few, tmp_path, monkeypatch):
    first, original = [], trajectory.fit

    def fit(*given, **options):
        first.append(options["first"])
        return original(*given, **options)

    monkeypatch.setattr(trajectory, "fit", fit)
    setting = setting_of(SHORT, few, tmp_path)
    for lists in (3, 5, 7):
        stopped(setting, lists)
    count = setting.batches.count(SHORT.training.batch_size)
    assert first == [0, 2 * count, 4 * count]
    for changes in (
        {"proof": dataclasses.replace(SHORT.proof, budget=0.4)},
        {"network": Network("cifar_vgg", {"depth": 9, "width": 0.25})},
    ):
        stopped(setting_of(dataclasses.replace(SHORT, **changes), few, tmp_path), 3)
    other = dataclasses.replace(few, fingerprint="other")
    stopped(setting_of(SHORT, other, tmp_path), 3)
    stopped(setting_of(SHORT, few, tmp_path, LOW), 3)
    stopped(setting, 2, Point(1e-3, 0, changes={"training.epochs": 5}))
    monkeypatch.setattr(trajectory, "package_versions", lambda: {"torch": "other"})
    stopped(setting, 2)
    assert first[3:] == [0] * 6


def test_a_trajectory_that_ended_tells_it_again_without_training(few, tmp_path, monkeypatch):
    setting = setting_of(SHORT, few, tmp_path)
    whole = list(run_trajectory(setting, Point(1e-3, 0)))
    (file,) = (tmp_path / "checkpoints" / "penalty0.001-seed0").iterdir()
    assert not checkpoint.load(file.parent).tensors
    monkeypatch.setattr(trajectory, "fit", lambda *_, **__: pytest.fail("it was trained again"))
    assert list(run_trajectory(setting, Point(1e-3, 0))) == whole


def test_that_it_begins_anew_with_other_versions_is_told(few, tmp_path, monkeypatch):
    setting = setting_of(SHORT, few, tmp_path)
    stopped(setting, 3)
    monkeypatch.setattr(trajectory, "package_versions", lambda: {"torch": "other"})
    (retry,), (check, *_), *_ = run_trajectory(setting, Point(1e-3, 0))
    assert (retry["event"], retry["attempt"], retry["anew"]) == ("retry", 1, True)
    assert retry["reason"].startswith("other versions")
    assert check["check"] == 1


@pytest.mark.parametrize(("spared", "epoch"), [(1, 3), (0, 0)])
def test_a_damaged_checkpoint_is_told_of(few, tmp_path, spared, epoch):
    setting = setting_of(SHORT, few, tmp_path)
    whole = list(run_trajectory(setting_of(SHORT, few, tmp_path / "whole"), Point(1e-3, 0)))
    stopped(setting, 5)
    folder = tmp_path / "checkpoints" / "penalty0.001-seed0"
    newest, previous = checkpoint.generations(folder)
    for name in (newest, previous)[: 2 - spared]:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    (retry,), *told = run_trajectory(setting, Point(1e-3, 0))
    assert retry == {
        "event": "retry",
        "trajectory": "penalty0.001-seed0",
        "attempt": 1,
        "reason": f"its newest checkpoint was damaged; it went on from epoch {epoch}",
    }
    assert timeless(told) == timeless(whole)


def test_a_lost_ticket_is_drawn_again(few, tmp_path):
    setting = setting_of(SHORT, few, tmp_path)
    whole = list(run_trajectory(setting, Point(1e-3, 0)))
    ticket = tmp_path / select(chain.from_iterable(whole), "ticket")[0]["path"]
    (ticket / "ticket.safetensors").write_bytes(b"torn")
    assert timeless(run_trajectory(setting, Point(1e-3, 0))) == timeless(whole)
    assert load_ticket(ticket).id == ticket.name


def test_a_trajectory_that_cannot_write_its_checkpoint_says_why(few, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        list(run_trajectory(setting_of(SHORT, few, tmp_path), Point(1e-3, 0)))
