"""Every method ends in tickets of the same kind, and says what finding them cost."""

import contextlib
import dataclasses
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raytickets import checkpoint, cost, methods, train
from raytickets.config import (
    Comparison,
    Data,
    InputError,
    Network,
    Resources,
    Retraining,
    SearchSpace,
    StopRule,
    Training,
)
from raytickets.data import load_data
from raytickets.draw import Trajectory, cut_groups
from raytickets.methods import Source, random_mask, retrain_alone, run_source, sources
from raytickets.models import build_network
from raytickets.shrink import channel_groups, mask_network, scorer, shrink
from raytickets.sweep import select
from raytickets.ticket import load_ticket
from raytickets.train import SGD, accuracy, fit, seeded
from raytickets.trajectory import Point, prepare, run_trajectory

SPACE = SearchSpace(
    name="tiny",
    network=Network("cifar_resnet", {"depth": 8, "width": 8}),
    data=Data("digits", limit=256),
    penalties=(1e-3, 1e-4, 1e-2),
    prune_ratios=(0.3, 0.6),
    training=Training(epochs=20, learning_rate=0.05, batch_size=32),
    retraining=Retraining(epochs=4, batch_size=32, learning_rate=0.05),
    min_channels=2,
    round_to=4,
    comparison=Comparison(seeds=(0,)),
    resources=Resources(watts=20.0),
)
SAMPLES = 256
DRAWN = ("early_bird", "early_bird_reinit", "random", "low_precision")


def changed(space=SPACE, comparison=None, **changes):
    chosen = dataclasses.replace(space.comparison, **(comparison or {}))
    return dataclasses.replace(space, comparison=chosen, **changes)


@pytest.fixture(scope="module")
def dataset():
    return load_data(SPACE.data)


def events_of(space, dataset, folder, *kinds):
    setting = prepare(space, dataset, folder)
    return [
        event
        for source in sources(space)
        if not kinds or source.kind in kinds
        for events in run_source(setting, source)
        for event in events
    ]


@pytest.fixture(scope="module")
def compared(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    return folder, events_of(SPACE, dataset, folder)


@pytest.fixture(scope="module")
def found(compared):
    """The events of the tickets, by method and prune ratio."""
    _, events = compared
    return {(e["method"], e["prune_ratio"]): e for e in select(events, "ticket")}


@pytest.fixture(scope="module")
def dense():
    """The network that seed 0 begins with, and its groups."""
    network = build_network(SPACE.network, in_channels=1, num_classes=10, seed=0)
    return network, channel_groups(network, torch.zeros(1, 1, 8, 8))


def same(network, other):
    ours, theirs = network.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_every_method_gives_a_ticket_for_every_ratio(found):
    ratios = {(method, ratio) for method in SPACE.comparison.methods for ratio in (0.3, 0.6)}
    assert found.keys() == {key for key in ratios if key[0] != "dense"} | {("dense", 0.0)}


def test_every_source_ends_with_its_trajectory(compared):
    _, events = compared
    ends = {event["trajectory"]: event for event in select(events, "trajectory")}
    assert list(ends) == [source.id for source in sources(SPACE)]
    assert {end["state"] for end in ends.values()} == {"drawn"}
    assert ends["dense-penalty0-seed0"]["ratios"] == {"0": "drawn"}
    assert ends["early_bird-penalty0.001-seed0"]["ratios"] == {"0.3": "drawn", "0.6": "drawn"}
    for source in sources(SPACE):
        checks = [e for e in select(events, "check") if e["trajectory"] == source.id]
        assert ends[source.id]["method"] == source.kind
        compared_masks = ends[source.id]["distances_matrix"]["epochs"]
        assert compared_masks == [e["epoch"] for e in checks if e["distances"]]
        assert bool(checks) == (source.kind not in ("dense", "snip"))


def test_progressive_records_distances_and_does_not_stop(compared):
    _, events = compared
    checks = [e for e in select(events, "check") if e["trajectory"].startswith("progressive")]
    assert [check["epoch"] for check in checks] == [1, 2, 3, 4]


def test_iterative_counts_on_from_network_to_network(compared):
    _, events = compared
    checks = [e for e in select(events, "check") if e["trajectory"].startswith("iterative")]
    (end,) = (e for e in select(events, "trajectory") if e["method"] == "iterative")
    # One network for both ratios, and two more for each.
    epochs = list(range(1, 4 * 5 + 1))
    assert [check["check"] for check in checks] == [check["epoch"] for check in checks] == epochs
    spent = [check["train_macs"] for check in checks]
    assert spent == sorted(set(spent))
    assert spent[-1] == end["train_macs"]
    assert not any(check["about_to_draw"] or check["distances"] for check in checks)


def test_sources_are_those_that_the_methods_need():
    space = changed(comparison={"methods": ("dense", "early_bird", "snip"), "seeds": (3, 4)})
    assert [source.id for source in sources(space)] == [
        f"{kind}-seed{seed}"
        for seed in (3, 4)
        for kind in ("dense-penalty0", "early_bird-penalty0.001", "snip-penalty0")
    ]
    given = sources(changed(comparison={"penalty": 0.5, "methods": ("dense", "lottery_ticket")}))
    assert given == [Source("dense", 0.0, 0), Source("progressive", 0.5, 0)]


def test_methods_that_are_not_asked_for_are_not_made(dataset, tmp_path):
    space = changed(comparison={"methods": ("dense", "lottery_ticket"), "prune_ratios": (0.5,)})
    events = events_of(space, dataset, tmp_path)
    made = [(event["method"], event["prune_ratio"]) for event in select(events, "ticket")]
    assert made == [("dense", 0.0), ("lottery_ticket", 0.5)]


def test_a_rewind_beyond_the_training_is_refused():
    with pytest.raises(InputError, match=r"comparison\.rewind: 4 .* below retraining\.epochs"):
        changed(comparison={"rewind": 4})


def test_masked_and_shrunk_networks_agree_for_every_ticket(compared, found, dense):
    folder, _ = compared
    _, groups = dense
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=seeded("images"))
    for event in found.values():
        ticket = load_ticket(folder / event["path"])
        masked = build_network(SPACE.network, in_channels=1, num_classes=10, seed=1).double().eval()
        # Where all BatchNorms are alike, a channel in the wrong place would not be seen.
        for scale in (m.weight for m in masked.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(scale, 0.5, 1.5, generator=seeded("scales"))
        shrunk = shrink(masked, groups, ticket.mask)
        mask_network(masked, groups, ticket.mask)
        torch.testing.assert_close(shrunk(images), masked(images), rtol=1e-9, atol=1e-12)
        shapes = {name: tensor.shape for name, tensor in shrunk.state_dict().items()}
        weights = ticket.network().state_dict()
        assert {name: tensor.shape for name, tensor in weights.items()} == shapes


def test_floor_and_rounding_are_the_same_for_every_method(compared, found):
    folder, _ = compared
    for event in found.values():
        for name, (kept, width) in event["kept"].items():
            assert kept >= 2
            assert kept % 4 == 0 or kept == width, (event["method"], name)
        manifest = load_ticket(folder / event["path"]).manifest
        assert manifest["method"] == event["method"]
        assert manifest["space"]["fingerprint"] == SPACE.fingerprint


def test_what_is_cut_is_as_much_as_the_ratio_says(compared, found):
    folder, _ = compared
    for (method, ratio), event in found.items():
        groups = load_ticket(folder / event["path"]).manifest["groups"]
        cut = "".join(group["cut"] for group in groups)
        if method != "random":
            near = 0.08 if method == "low_precision" else 0.02  # Ties go together.
            assert cut.count("1") / len(cut) == pytest.approx(1 - ratio, abs=near), method


def test_dense_keeps_everything_and_costs_nothing(compared, found, dense):
    folder, _ = compared
    event = found["dense", 0.0]
    ticket = load_ticket(folder / event["path"])
    assert ticket.mask.all()
    assert same(ticket.network(), dense[0])
    costs = [event["search"][name] for name in ("forward_macs", "samples", "seconds", "joules")]
    assert costs == [0, 0, 0, 0]


def test_early_bird_draws_what_a_sweep_draws(compared, found, dataset, tmp_path):
    folder, _ = compared
    setting = prepare(SPACE, dataset, tmp_path)
    swept = [event for events in run_trajectory(setting, Point(1e-3, 0)) for event in events]
    for event in select(swept, "ticket"):
        ours = found["early_bird", event["prune_ratio"]]
        tickets = load_ticket(folder / ours["path"]), load_ticket(tmp_path / event["path"])
        assert tickets[0].id == tickets[1].id
        assert ours["mask_distance"] == event["mask_distance"]


def test_reinit_has_the_mask_of_early_bird_and_weights_of_its_own(compared, found, dense):
    folder, _ = compared
    for ratio in (0.3, 0.6):
        ours, drawn = (
            load_ticket(folder / found[method, ratio]["path"])
            for method in ("early_bird_reinit", "early_bird")
        )
        assert torch.equal(ours.mask, drawn.mask)
        start = shrink(*dense, ours.mask)
        weights = [ours.network(), drawn.network(), start]
        firsts = [next(network.parameters()).detach() for network in weights]
        assert not any(torch.equal(firsts[0], other) for other in firsts[1:])
        assert firsts[0].std() == pytest.approx(firsts[2].std().item(), rel=0.5)


def test_random_has_the_widths_of_early_bird_and_other_channels(compared, found, dense):
    folder, _ = compared
    for ratio in (0.3, 0.6):
        ours, drawn = found["random", ratio], found["early_bird", ratio]
        assert ours["kept"] == drawn["kept"]
        assert (ours["macs"], ours["params"]) == (drawn["macs"], drawn["params"])
        assert ours["search"] == drawn["search"]
        mask, other = (load_ticket(folder / event["path"]).mask for event in (ours, drawn))
        assert not torch.equal(mask, other)
        assert torch.equal(mask, random_mask(dense[1], other, seeded("random", 0, ratio)))


def test_random_weights_are_those_of_the_draw(compared, found):
    """A channel that both kept has the same BatchNorm in both."""
    folder, _ = compared
    tickets = [load_ticket(folder / found[m, 0.3]["path"]) for m in ("random", "early_bird")]
    stems = [ticket.manifest["groups"][0] for ticket in tickets]
    assert {stem["name"] for stem in stems} == {"0"}
    shared = 0
    for channel in range(8):
        if all(stem["mask"][channel] == "1" for stem in stems):
            places = [stem["mask"][:channel].count("1") for stem in stems]
            norms = [ticket.network()[1] for ticket in tickets]
            values = [norm.running_mean[place] for norm, place in zip(norms, places, strict=True)]
            assert values[0] == values[1] != 0
            shared += 1
    assert shared


def test_lottery_ticket_has_the_mask_of_progressive_and_the_initial_weights(compared, found, dense):
    folder, _ = compared
    for ratio in (0.3, 0.6):
        ours, last = (
            load_ticket(folder / found[method, ratio]["path"])
            for method in ("lottery_ticket", "progressive")
        )
        assert torch.equal(ours.mask, last.mask)
        assert same(ours.network(), shrink(*dense, ours.mask))
        assert not same(ours.network(), last.network())


def test_lottery_ticket_rewinds_to_an_early_epoch(dataset, tmp_path):
    retraining = dataclasses.replace(SPACE.retraining, schedule="constant", epochs=3)
    comparison = {"methods": ("dense", "lottery_ticket"), "rewind": 2}
    space = changed(comparison=comparison, retraining=retraining)
    event = select(events_of(space, dataset, tmp_path, "progressive"), "ticket")[0]
    ticket = load_ticket(tmp_path / event["path"])

    setting, two = prepare(space, dataset, tmp_path), dataclasses.replace(retraining, epochs=2)
    network = build_network(space.network, in_channels=1, num_classes=10, seed=0)
    optimizer = SGD(setting.numerics.place(network), two.momentum, two.weight_decay)

    args = network, optimizer, setting.batches, two, ("trajectory", 0), setting.numerics
    *_, (steps, _) = fit(*args, penalty=1e-3)
    assert steps == 2 * setting.batches.count(two.batch_size)
    assert same(ticket.network(), shrink(network, setting.groups, ticket.mask))


def test_snip_scores_the_initial_network_and_leaves_it_alone(compared, found, dense, dataset):
    folder, _ = compared
    network, groups = dense
    ticket = load_ticket(folder / found["snip", 0.6]["path"])
    assert same(ticket.network(), shrink(network, groups, ticket.mask))
    images, labels = next(prepare(SPACE, dataset, folder).batches.training(128, seeded("snip", 0)))
    looked = build_network(SPACE.network, in_channels=1, num_classes=10, seed=0)
    torch.nn.functional.cross_entropy(looked(images), labels).backward()
    scores = dict.fromkeys((group.name for group in groups), 0)
    for group in groups:
        for part in group.parts:
            if part.axis == "out":
                weight = looked.get_submodule(part.module).weight
                scores[group.name] += (weight * weight.grad).abs().sum((1, 2, 3))
    every = torch.cat(list(scores.values()))
    cut = torch.tensor([c == "1" for g in ticket.manifest["groups"] for c in g["cut"]])
    assert every[cut].min() > every[~cut].max()


def with_dropout(*, num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16 * 36, num_classes),
    )


def test_snip_repeats_bit_for_bit_whatever_was_drawn_before(dataset, tmp_path):
    space = changed(network=Network("test_methods:with_dropout"), round_to=1)
    tickets = []
    for name in ("a", "b"):
        torch.rand(len(tickets) + 1)
        events = events_of(space, dataset, tmp_path / name, "snip")
        tickets.append([event["ticket"] for event in select(events, "ticket")])
    assert tickets[0] == tickets[1]


def test_low_precision_finds_another_ticket_and_saves_it_in_float32(compared, found):
    folder, _ = compared
    for ratio in (0.3, 0.6):
        ticket = load_ticket(folder / found["low_precision", ratio]["path"])
        assert ticket.manifest["precision"] == "bfloat16"
        tensors = [tensor for tensor in ticket.network().state_dict().values() if tensor.ndim]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        # Every weight is a bfloat16 number.
        assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors)
        other = load_ticket(folder / found["early_bird", ratio]["path"]).network()
        assert not all(torch.equal(t, t.bfloat16().float()) for t in other.parameters())


def test_ledgers_count_forward_and_backward_macs_of_the_search_alone(compared, found, dense):
    _, events = compared
    macs = cost.macs(dense[0], torch.zeros(1, 1, 8, 8))
    checks = {(e["trajectory"], e["check"]): e for e in select(events, "check")}
    for (method, _), event in found.items():
        ledger = event["search"]
        assert ledger["backward_macs"] == 2 * ledger["forward_macs"]
        if method in DRAWN:
            check = checks[event["trajectory"], event["draw_check"]]
            assert ledger["samples"] == SAMPLES * event["draw_epoch"]
            assert ledger["forward_macs"] + ledger["backward_macs"] == check["train_macs"]
        if method in ("progressive", "lottery_ticket"):
            assert ledger["samples"] == SAMPLES * 4
        if method == "snip":
            assert ledger["samples"] == 128
        if method != "iterative":
            assert ledger["forward_macs"] == macs * ledger["samples"]
        assert ledger["energy"].startswith(("measured", "estimated"))
        if ledger["energy"].startswith("estimated"):
            assert ledger["joules"] == pytest.approx(20 * ledger["seconds"], rel=0.1, abs=0.01)


def test_ratios_that_share_a_source_pay_to_their_own_end(found):
    by_method = {
        method: [found[method, r] for r in (0.3, 0.6)] for method in ("progressive", "snip")
    }
    for first, second in by_method.values():
        assert first["search"] == second["search"]
    early, late = sorted(
        (found["early_bird", r] for r in (0.3, 0.6)), key=lambda event: event["draw_check"]
    )
    if early["draw_check"] < late["draw_check"]:
        assert early["search"]["seconds"] < late["search"]["seconds"]


def test_iterative_pays_for_each_of_its_networks(dataset, tmp_path, monkeypatch):
    rounds, original = [], methods._train

    def recorded(trajectory, network, mask, *rest):
        rounds.append((cost.macs(network, torch.zeros(1, 1, 8, 8)), mask))
        return original(trajectory, network, mask, *rest)

    monkeypatch.setattr(methods, "_train", recorded)
    # Rounding up could give back all that a round cuts off.
    space = changed(comparison={"rounds": 3}, round_to=1)
    events = events_of(space, dataset, tmp_path, "iterative")
    tickets, (end,) = select(events, "ticket"), select(events, "trajectory")
    dense, *later = rounds
    for event, own in zip(tickets, (later[:2], later[2:]), strict=True):
        each = SAMPLES * 4
        assert event["search"]["samples"] == 3 * each
        assert event["search"]["forward_macs"] == each * (dense[0] + own[0][0] + own[1][0])
        masks = [dense[1], own[0][1], own[1][1], load_ticket(tmp_path / event["path"]).mask]
        for wider, narrower in pairwise(masks):
            assert narrower.sum() < wider.sum()
            assert not (narrower & ~wider).any()
    assert end["epochs"] == 4 * 5
    assert end["train_macs"] == 3 * SAMPLES * 4 * sum(macs for macs, _ in rounds)


def test_a_round_scores_the_channels_that_are_left(dataset, tmp_path, dense):
    network, groups = dense
    setting = prepare(SPACE, dataset, tmp_path)
    recipe = dataclasses.replace(SPACE.retraining, epochs=1)
    trajectory = Trajectory(setting, "x", "iterative", 1e-3, 0, recipe, (0.5,), setting.meter())
    width = sum(group.width for group in groups)
    mask = torch.rand(width, generator=seeded("mask")) < 0.5
    small = shrink(network, groups, mask)
    training, done = methods._train(trajectory, small, mask, "0.5-1", []), None
    while done is None:
        try:
            next(training)
        except StopIteration as returned:
            done = returned.value
    assert (done.scores[~mask] == -torch.inf).all()
    assert torch.equal(
        done.scores[mask], scorer(small, channel_groups(small, torch.zeros(1, 1, 8, 8)))()
    )


@given(st.data())
def test_rounds_never_ask_for_a_channel_that_is_gone(data):
    widths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    setting = SimpleNamespace(
        space=SimpleNamespace(
            min_channels=data.draw(st.integers(1, 6)), round_to=data.draw(st.integers(1, 9))
        ),
        groups=[SimpleNamespace(width=width, parts=()) for width in widths],
    )
    rounds, ratio = data.draw(st.integers(2, 5)), data.draw(st.floats(0.01, 0.99))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    mask = torch.ones(sum(widths), dtype=torch.bool)
    for number in range(1, rounds + 1):
        # Few values, so that there are ties.
        scores = torch.randint(6, (sum(widths),), generator=generator).float()
        scores[~mask] = -torch.inf
        narrower, _ = cut_groups(setting, scores, ratio * number / rounds)
        assert not (narrower & ~mask).any()
        for part, width in zip(narrower.split(widths), widths, strict=True):
            assert part.sum() >= min(width, setting.space.min_channels)
        mask = narrower


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=6),
    st.integers(0, 1000),
)
def test_a_random_mask_has_the_same_widths(parts, seed):
    groups = [SimpleNamespace(width=len(part), parts=()) for part in parts]
    mask = torch.tensor([kept for part in parts for kept in part])
    other = random_mask(groups, mask, seeded(seed))
    widths = [len(part) for part in parts]
    assert [int(p.sum()) for p in other.split(widths)] == [sum(part) for part in parts]
    assert torch.equal(other, random_mask(groups, mask, seeded(seed)))


def test_a_random_mask_favours_no_channel():
    groups = [SimpleNamespace(width=width, parts=()) for width in (8, 4)]
    mask = torch.tensor([True] * 2 + [False] * 6 + [False] + [True] * 3)
    drawn = torch.stack([random_mask(groups, mask, seeded(place)) for place in range(2000)])
    shares = drawn.double().mean(0)
    assert shares[:8].tolist() == pytest.approx([0.25] * 8, abs=0.05)
    assert shares[8:].tolist() == pytest.approx([0.75] * 4, abs=0.05)


def test_tickets_repeat_bit_for_bit(compared, dataset, tmp_path):
    _, events = compared
    again = events_of(SPACE, dataset, tmp_path)
    ids = [[event["ticket"] for event in select(run, "ticket")] for run in (events, again)]
    assert len(set(ids[0])) == len(ids[0]) == 1 + 8 * 2
    assert ids[0] == ids[1]


def test_a_ratio_that_does_not_draw_has_no_ticket(dataset, tmp_path):
    training = dataclasses.replace(SPACE.training, epochs=6)
    space = changed(training=training, stop_rule=StopRule(threshold=1e-9))
    events = events_of(space, dataset, tmp_path, "early_bird")
    assert not select(events, "ticket")
    (end,) = select(events, "trajectory")
    assert end["state"] == "not converged"
    assert end["ratios"] == {"0.3": "not converged", "0.6": "not converged"}


@pytest.mark.parametrize("kind", ["early_bird", "low_precision", "progressive", "iterative"])
def test_a_source_that_diverges_says_so(dataset, tmp_path, kind):
    training = dataclasses.replace(SPACE.training, learning_rate=1e20)
    retraining = dataclasses.replace(SPACE.retraining, learning_rate=1e20)
    space = changed(training=training, retraining=retraining)
    events = events_of(space, dataset, tmp_path, kind)
    assert not select(events, "ticket")
    (end,) = select(events, "trajectory")
    assert end["state"] == "diverged"
    assert end["ratios"] == {"0.3": "diverged", "0.6": "diverged"}
    assert "loss was" in end["reason"]
    json.dumps(events, allow_nan=False)


@pytest.fixture(scope="module")
def retrained(compared, found, dataset):
    folder, _ = compared
    event = found["early_bird", 0.6]
    setting = prepare(SPACE, dataset, folder)
    return event, [e for some in retrain_alone(setting, folder / event["path"]) for e in some]


def test_retraining_tells_of_every_epoch_and_then_of_the_result(retrained, compared, dataset):
    folder, _ = compared
    ticket, (*epochs, done) = retrained
    assert [e["epoch"] for e in select(epochs, "epoch")] == [1, 2, 3, 4]
    assert {e["run"] for e in (*epochs, done)} == {ticket["ticket"]}
    assert done["event"] == "retrained"
    assert (done["macs"], done["params"]) == (ticket["macs"], ticket["params"])
    assert done["latency_ms"] > 0
    assert 0.05 < done["relative_latency"] < 5
    network, setting = load_ticket(folder / done["path"]).network(), prepare(SPACE, dataset, folder)
    exact = setting.numerics.exact
    for split in ("validation", "test"):
        again = accuracy(exact.place(network), setting.batches, split, exact)
        assert again == done[f"{split}_accuracy"]


def test_retraining_counts_what_it_cost(retrained):
    ticket, (*_, done) = retrained
    ledger = done["ledger"]
    assert ledger["samples"] == SAMPLES * 4
    assert ledger["forward_macs"] == ticket["macs"] * SAMPLES * 4
    assert ledger["forward_macs"] + ledger["backward_macs"] == done["train_macs"]
    assert ledger["seconds"] <= done["seconds"]


def test_retraining_repeats_bit_for_bit(retrained, compared, dataset, tmp_path):
    folder, _ = compared
    ticket, (*_, done) = retrained
    setting = prepare(SPACE, dataset, tmp_path)
    *_, (again,) = retrain_alone(setting, folder / ticket["path"])
    networks = [
        load_ticket(f / e["path"]).network() for f, e in ((folder, done), (tmp_path, again))
    ]
    assert same(*networks)
    assert again["test_accuracy"] == done["test_accuracy"]


def timeless(lists):
    """The events of the lists, but for what differs from run to run."""
    changing = ("seconds", "joules", "latency_ms", "relative_latency")
    return [
        {
            k: timeless([[v]])[0] if isinstance(v, dict) else v
            for k, v in event.items()
            if k not in changing
        }
        for events in lists
        for event in events
    ]


def begun_again_and_again(begin, whole):
    """What comes of a work that is stopped after every list of events but the last."""
    told = []
    for lists in range(1, len(whole) + 1):
        torch.rand(lists)  # whatever else the process has drawn
        told, steps = [], begin()
        # What is told again may come at once.
        while len(timeless(told)) < len(timeless(whole[:lists])):
            told.append(next(steps))
        steps.close()
    return told


@pytest.mark.parametrize("kind", ["early_bird", "low_precision", "progressive", "iterative"])
def test_a_source_that_was_stopped_is_as_one_that_never_was(dataset, tmp_path, kind):
    space = changed(
        comparison={"rewind": 1},
        training=dataclasses.replace(SPACE.training, epochs=6),
        stop_rule=StopRule(window=3, threshold=0.5),
    )
    (source,) = (source for source in sources(space) if source.kind == kind)
    whole = list(run_source(prepare(space, dataset, tmp_path / "a"), source))
    setting = prepare(space, dataset, tmp_path / "b")
    told = begun_again_and_again(lambda: run_source(setting, source), whole)
    assert select(whole[-1], "trajectory")
    assert timeless(told) == timeless(whole)


def test_a_source_that_begins_anew_says_so_once(dataset, tmp_path, monkeypatch):
    (source,) = (source for source in sources(SPACE) if source.kind == "iterative")
    setting = prepare(SPACE, dataset, tmp_path)
    first = [event for events in run_source(setting, source) for event in events]
    monkeypatch.setattr(methods, "made_by", lambda _: {"versions": "others"})
    again = [event for events in run_source(setting, source) for event in events]
    assert again[0]["event"] == "retry"
    assert timeless([again[1:]]) == timeless([first])


def test_a_round_that_was_stopped_is_as_one_that_never_was(dataset, tmp_path, monkeypatch):
    (source,) = (source for source in sources(SPACE) if source.kind == "iterative")
    whole = list(run_source(prepare(SPACE, dataset, tmp_path / "a"), source))
    setting, original, trained = prepare(SPACE, dataset, tmp_path / "b"), methods.checks, []

    def dying(*given):
        for check in original(*given):
            trained.append(check.epoch)
            if len(trained) % 7 == 0:
                raise InterruptedError
            yield check

    monkeypatch.setattr(methods, "checks", dying)
    told, deaths = None, 0
    while told is None:
        try:
            told = list(run_source(setting, source))
        except InterruptedError:
            deaths += 1
    assert timeless(told) == timeless(whole)
    # 5 networks for 4 epochs, and every death repeats one.
    assert len(trained) == 5 * 4 + deaths
    assert deaths == 3


def test_a_retraining_that_was_stopped_is_as_one_that_never_was(
    retrained, compared, dataset, tmp_path
):
    folder, _ = compared
    ticket, whole = retrained
    setting = prepare(SPACE, dataset, tmp_path)

    def begin():
        return retrain_alone(setting, folder / ticket["path"])

    told = begun_again_and_again(begin, [[event] for event in whole])
    assert timeless(told) == timeless([whole])
    (again,) = begin()
    assert again == [event for events in told for event in events]


def test_a_retraining_that_died_within_an_epoch_is_as_one_that_never_was(
    retrained, compared, dataset, tmp_path, monkeypatch
):
    folder, _ = compared
    ticket, whole = retrained
    setting, original, trained = prepare(SPACE, dataset, tmp_path), methods.fit, []

    def dying(*given, **options):
        for number, part in enumerate(original(*given, **options), start=1):
            trained.append(part[0])
            if number > 3:
                raise InterruptedError
            yield part

    monkeypatch.setattr(methods, "fit", dying)
    monkeypatch.setattr(train, "PART", 3)
    monkeypatch.setattr(checkpoint, "INTERVAL_S", 0)
    told = None
    while told is None:
        with contextlib.suppress(InterruptedError):
            told = list(retrain_alone(setting, folder / ticket["path"]))
    ends = setting.batches.count(SPACE.retraining.batch_size)
    assert any(steps % ends for steps in trained[3::4])
    for mine, theirs in zip(timeless(told), timeless([whole]), strict=True):
        assert mine | {"loss": None} == theirs | {"loss": None}
        assert mine.get("loss") == pytest.approx(theirs.get("loss"))


def test_a_retraining_that_diverges_says_so(found, compared, dataset, tmp_path):
    folder, _ = compared
    recipe = dataclasses.replace(SPACE.retraining, learning_rate=1e30)
    setting = prepare(changed(retraining=recipe), dataset, tmp_path)
    with pytest.raises(FloatingPointError, match=r"the loss was (nan|inf) in epoch"):
        list(retrain_alone(setting, folder / found["snip", 0.3]["path"]))


def test_retraining_starts_from_the_tickets_weights_and_its_seed(found, compared, dataset):
    folder, _ = compared
    setting = prepare(SPACE, dataset, folder)
    path = folder / found["snip", 0.3]["path"]
    *_, (done,) = retrain_alone(setting, path)
    network, recipe = load_ticket(path).network(), SPACE.retraining
    optimizer = SGD(setting.numerics.place(network), recipe.momentum, recipe.weight_decay)
    batches = setting.batches
    *_, (steps, _) = fit(network, optimizer, batches, recipe, ("retrain", 0), setting.numerics)
    assert steps == 4 * batches.count(recipe.batch_size)
    assert same(load_ticket(folder / done["path"]).network(), network.cpu())
