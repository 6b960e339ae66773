"""A search space refuses what cannot be used, and is the same thing wherever it is read."""

import dataclasses
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from raytickets.config import (
    Comparison,
    Data,
    Halving,
    InputError,
    Network,
    Optuna,
    Proof,
    Range,
    Resources,
    Retraining,
    SearchSpace,
    StopRule,
    Training,
)


def space(**changes: Any) -> SearchSpace:
    fields: dict[str, Any] = {
        "name": "tiny",
        "network": Network("cifar_vgg"),
        "data": Data(),
        "penalties": (1e-4,),
        "prune_ratios": (0.5,),
        "training": Training(epochs=5),
        "retraining": Retraining(epochs=5),
    }
    return SearchSpace(**fields | changes)


def recipe(**changes: Any) -> Training:
    fields: dict[str, Any] = {"epochs": 5} | changes
    return Training(**fields)


def proposals(**changes: Any) -> Optuna:
    fields: dict[str, Any] = {"trajectories": 4, "ranges": {"penalty": Range(1e-5, 1e-3)}}
    return Optuna(**fields | changes)


def test_what_is_left_out_has_a_usable_value():
    made = space()
    assert made.stop_rule == StopRule("corrected", window=5, checks_per_epoch=1)
    assert made.proof == Proof(budget=1, rungs=2)
    assert made.halving is None
    assert (made.round_to, made.precision, made.channels_last) == (8, "auto", True)
    assert made.data.loading == "auto"
    assert made.seeds == (0,)
    assert made.resources == Resources(cpus_per_trial=1, gpus_per_trial=None)


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        (StopRule("paper"), 0.1),
        (StopRule("corrected"), 0.2),
        (StopRule("epi"), 0.017),
        (StopRule("paper", threshold=0.05), 0.05),
    ],
)
def test_the_threshold_is_the_rules_own_unless_given(rule, limit):
    assert rule.limit == limit


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: space(name=""), "name"),
        (lambda: space(name="_draft"), "name"),
        (lambda: space(name=None), "name"),
        (lambda: Network(""), "network.name"),
        (lambda: Network("cifar_vgg", [("depth", 9)]), "network.options"),  # type: ignore[arg-type]
        (lambda: Network("cifar_vgg", {"width": float("nan")}), "network.options"),
        (lambda: Data("cifar10", "x", image_size=32), "data.image_size"),
        (lambda: Data("cifar10", "x", loading="stream"), "data.loading"),
        (lambda: Data("folder", "x", download=True), "data.download"),
        (lambda: Data("cifar10", "x", download=1), "data.download"),  # type: ignore[arg-type]
        (lambda: Data("folder", "x", columns=("a", "b")), "data.columns"),
        (lambda: Data("huggingface", "x", columns=("a",)), "data.columns"),  # type: ignore[arg-type]
        (lambda: Data("folder", "x", random_resized_crop=True), "data.image_size"),
        (lambda: Data("cifar10", "x", random_resized_crop=True), "data.random_resized_crop"),
        (
            lambda: Data("folder", "x", 8, crop_padding=1, random_resized_crop=True),
            "data.crop_padding",
        ),
        (
            lambda: Data("folder", "x", 8, loading="memory", random_resized_crop=True),
            "data.loading",
        ),
        (lambda: Data(test=1), "data.test"),
        (lambda: Data(flip="no"), "data.flip"),  # type: ignore[arg-type]
        (lambda: Data(limit=9), "data.limit"),
        (lambda: Data(split_seed=-1), "data.split_seed"),
        (lambda: Data("folder", "x", loader_workers=0), "data.loader_workers"),
        (lambda: StopRule(threshold=1.0), "stop_rule.threshold"),
        (lambda: StopRule(checks_per_epoch=0.5), "stop_rule.checks_per_epoch"),  # type: ignore[arg-type]
        (lambda: proposals(trajectories=0), "optuna.trajectories"),
        (lambda: proposals(ranges={}), "optuna.ranges"),
        (lambda: proposals(ranges={"penalty": Range(1.0, 1.0)}), "optuna.ranges['penalty']"),
        (lambda: proposals(ranges={"penalty": Range(0, 1, True)}), "optuna.ranges['penalty']"),
        (lambda: proposals(ranges={"penalty": [1e-4]}), "optuna.ranges['penalty']"),
        (lambda: proposals(ranges={"penalty": ()}), "optuna.ranges['penalty']"),
        (
            lambda: proposals(ranges={"training.milestones": ((1, 2), (2, 3))}),
            "optuna.ranges['training.milestones']",
        ),
        (lambda: proposals(objective="accuracy"), "optuna.objective"),
        (lambda: proposals(sampler="grid"), "optuna.sampler"),
        (lambda: proposals(startup=0), "optuna.startup"),
        (lambda: proposals(seed=-1), "optuna.seed"),
        (lambda: proposals(storage="study.db"), "optuna.storage"),
        (lambda: space(optuna=3), "optuna"),
        (
            lambda: space(
                penalties=(1e-4, 1e-3), optuna=proposals(ranges={"training.momentum": (0.5, 0.9)})
            ),
            "penalties",
        ),
        (lambda: Resources(gpus_per_trial=1.5), "resources.gpus_per_trial"),
        (lambda: space(training=recipe(learning_rate=float("inf"))), "training.learning_rate"),
        (lambda: space(training=recipe(weight_decay=-1e-9)), "training.weight_decay"),
        (lambda: space(training=recipe(schedule="step")), "training.schedule"),
        (lambda: space(training=recipe(schedule="multistep", milestones=3)), "training.milestones"),
        (
            lambda: space(training=recipe(schedule="multistep", milestones=(0,))),
            "training.milestones",
        ),
        (lambda: Proof(budget=float("inf")), "proof.budget"),
        (lambda: Proof(budget="1"), "proof.budget"),  # type: ignore[arg-type]
        (lambda: Proof(rungs=1.5), "proof.rungs"),  # type: ignore[arg-type]
        (lambda: Proof(batch_size=1), "proof.batch_size"),
        (lambda: Proof(learning_rate=0), "proof.learning_rate"),
        (lambda: Proof(momentum=1), "proof.momentum"),
        (lambda: Proof(weight_decay=-1e-9), "proof.weight_decay"),
        (lambda: Halving(grace=0), "halving.grace"),
        (lambda: space(training=Training(epochs=9), halving=Halving(grace=10)), "halving.grace"),
        (
            lambda: space(retraining=Retraining(epochs=5, batch_size=8, num_workers=9)),
            "retraining.num_workers",
        ),
        *(
            (
                lambda asked=asked: space(retraining=Retraining(epochs=5, num_workers=asked)),
                "retraining.num_workers",
            )
            for asked in ((), (2,), (1, 2, 3), (0, 2), (3, 2), (1, 65), (1, None), [1, 2], "2")
        ),
        (lambda: space(penalties=()), "penalties"),
        (lambda: space(penalties=[1e-4]), "penalties"),
        (lambda: space(prune_ratios=([0.5],)), "prune_ratios"),
        (lambda: space(prune_ratios=(0.5, 0.5000001)), "prune_ratios"),
        (lambda: space(seeds=(0.5,)), "seeds"),
        (lambda: space(seeds=(1, 1)), "seeds"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_the_name_of_its_field(make, field):
    with pytest.raises(InputError) as refused:
        make()
    assert str(refused.value).startswith(f"{field}: ")


def test_the_budget_has_room_for_the_window_in_checks_and_not_in_epochs():
    twice = StopRule(window=5, checks_per_epoch=2)
    assert space(training=recipe(epochs=3), stop_rule=twice).training.epochs == 3
    with pytest.raises(InputError, match=r"^training\.epochs: 2 .* stop_rule\.window, which is 5"):
        space(training=recipe(epochs=2), stop_rule=twice)


def test_an_input_error_names_field_value_and_what_is_allowed_in_one_line():
    error = InputError("penalties", -1.5, "must be at least 0,\n  so no reward")
    assert str(error) == "penalties: -1.5 is not allowed: must be at least 0, so no reward"


def test_an_input_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(InputError("seeds", (1, 1), "each may occur once")))
    assert isinstance(error, InputError)
    assert str(error) == "seeds: (1, 1) is not allowed: each may occur once"


def test_trajectories_are_those_of_the_grid_or_as_many_as_optuna_proposes():
    assert space(penalties=(1e-4, 1e-3), seeds=(0, 1, 2)).trajectories == 6
    assert space(seeds=(0, 1, 2), optuna=proposals(trajectories=11)).trajectories == 11


def test_large_seeds_that_differ_in_the_last_digit_are_different():
    assert space(seeds=(20261122, 20261123)).seeds == (20261122, 20261123)


def test_a_space_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        space().winners = 5  # type: ignore[misc]


CHANGES: dict[str, Any] = {
    "name": "other",
    "network": Network("cifar_vgg", {"depth": 9}),
    "data": Data(split_seed=1),
    "penalties": (1e-4, 1e-3),
    "prune_ratios": (0.6,),
    "training": Training(epochs=6),
    "retraining": Retraining(epochs=5, weights="reinit"),
    "proof": Proof(rungs=3),
    "stop_rule": StopRule("paper"),
    "min_channels": 2,
    "round_to": 16,
    "precision": "float32",
    "channels_last": False,
    "halving": Halving(),
    "optuna": Optuna(trajectories=9, ranges={"penalty": Range(1e-5, 1e-2, log=True)}),
    "comparison": Comparison(seeds=(0, 1)),
    "seeds": (1,),
    "winners": 1,
    "resources": Resources(cpus_per_trial=2),
}


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////data/study.db",
        "postgresql://host/name",
        "postgresql://me@host:5432/name",
        "postgresql+psycopg://me:${PGPASSWORD}@host/name",
    ],
)
def test_a_study_may_be_kept_in_any_database(url):
    assert proposals(storage=url).storage == url


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:sesame@host/name",
        "postgresql://me:${NAME}sesame@host/name",
        "postgresql://me:sesame:@host/name",
        "postgresql://me:sesame/@host/name",
        "postgresql://host/name?user=me&password=sesame",
        "mysql://host/name?user=me&passwd=sesame",
        "mssql://?odbc_connect=DRIVER%3DX%3BPWD%3Dsesame",
        "me:sesame@host/name",
    ],
)
def test_a_password_is_refused_and_not_repeated(url):
    """A space is recorded as it is, in the journal and in MLflow."""
    with pytest.raises(InputError, match=r"^optuna\.storage: ") as refused:
        proposals(storage=url)
    assert "sesame" not in str(refused.value)


def test_milestones_keep_their_shares_of_other_epochs():
    given = Retraining(epochs=160, schedule="multistep", milestones=(80, 120))
    found = {
        epochs: space(retraining=given).with_retraining(epochs=epochs) for epochs in (160, 20, 1)
    }
    assert {n: one.retraining.milestones for n, one in found.items()} == {
        160: (80, 120),
        20: (10, 15),
        1: (1, 1),
    }


def test_retraining_by_hand_may_be_shorter_than_a_comparisons_rewind():
    rewound = space(retraining=Retraining(epochs=9), comparison=Comparison(rewind=5))
    assert rewound.with_retraining(epochs=8).comparison.rewind == 5
    assert rewound.with_retraining(epochs=2).retraining.epochs == 2
    with pytest.raises(InputError, match=r"^retraining\.epochs: 0 "):
        rewound.with_retraining(epochs=0)


def test_every_field_changes_the_fingerprint():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(SearchSpace)}
    prints = [space(**{name: value}).fingerprint for name, value in CHANGES.items()]
    assert len({space().fingerprint, *prints}) == len(CHANGES) + 1


def test_the_fingerprint_is_of_the_values_and_not_of_how_they_were_written():
    options = {"depth": 9, "width": 0.5}
    written = Network("cifar_vgg", options), Network("cifar_vgg", dict(reversed(options.items())))
    first, second = (space(network=network).fingerprint for network in written)
    assert first == second
    assert space().fingerprint == space(seeds=(0,), stop_rule=StopRule()).fingerprint


shares = st.floats(0.01, 0.45)
penalties = st.lists(st.sampled_from([0, 1e-5, 3e-4, 0.01, 2]), min_size=1, unique=True).map(tuple)
ratios = st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.95]), min_size=1, unique=True).map(tuple)
steps = {
    "batch_size": st.integers(1, 500).map(lambda half: 2 * half),
    "learning_rate": st.floats(1e-6, 10),
    "momentum": st.floats(0, 0.999),
    "weight_decay": st.floats(0, 1),
}
recipes = {"epochs": st.integers(5, 300), **steps}
schedules = st.sampled_from(
    [
        {"schedule": "constant"},
        {"schedule": "cosine"},
        {"schedule": "multistep", "milestones": (2, 4)},
    ]
)
trainings = st.builds(
    lambda fields, schedule: Training(**fields | schedule),
    st.fixed_dictionaries(recipes),
    schedules,
)
retrainings = st.builds(
    Retraining,
    **recipes | {"batch_size": st.integers(4, 512)},
    weights=st.sampled_from(["inherit", "reinit"]),
    num_workers=st.sampled_from([None, 1, 2, (1, 2)]),
)
spaces = st.builds(
    SearchSpace,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,11}", fullmatch=True),
    network=st.builds(
        Network,
        st.sampled_from(["cifar_vgg", "resnet18", "mine.nets:tiny"]),
        st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.lists(st.text())),
    ),
    data=st.just(Data("huggingface", "x", columns=("image", "label")))
    | st.builds(
        Data,
        st.sampled_from(["folder", "huggingface"]),
        st.text(),
        st.none() | st.integers(1, 512),
        shares,
        shares,
        flip=st.booleans(),
        limit=st.none() | st.integers(10),
        loading=st.sampled_from(["auto", "memory"]),
        loader_workers=st.integers(1, 8),
    ),
    penalties=penalties,
    prune_ratios=ratios,
    training=trainings,
    retraining=retrainings,
    proof=st.builds(Proof, budget=st.floats(0.01, 100), rungs=st.integers(1, 6), **steps),
    stop_rule=st.builds(
        StopRule,
        st.sampled_from(["paper", "corrected"]),
        st.integers(2, 5),
        st.none() | shares,
        st.integers(1, 10),
    ),
    round_to=st.sampled_from([1, 8]),
    precision=st.sampled_from(["auto", "float32", "bfloat16"]),
    channels_last=st.booleans(),
    halving=st.none() | st.builds(Halving, st.integers(1, 5), st.integers(2, 4)),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, unique=True).map(tuple),
    resources=st.builds(Resources, st.integers(1, 64), st.sampled_from([0, 0.5, 1])),
)


@given(spaces)
def test_a_space_survives_being_written_down(made):
    again = SearchSpace.from_dict(made.as_dict())
    assert again == made
    assert again.fingerprint == made.fingerprint


def test_fields_are_written_in_their_order():
    assert list(space().as_dict()) == [field.name for field in dataclasses.fields(SearchSpace)]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda values: values.pop("network"),
        lambda values: values.update(surplus=1),
        lambda values: values["training"].update(epoch=5),
        lambda values: values.update(data=None),
    ],
)
def test_what_does_not_describe_a_space_is_refused(break_it):
    values = space().as_dict()
    break_it(values)
    with pytest.raises(InputError, match=r"^space: 'tiny' is not allowed: .*search space"):
        SearchSpace.from_dict(values)


def test_retraining_otherwise_leaves_the_rest_alone():
    changed = space().with_retraining(epochs=7, weights="reinit")
    assert changed == space(retraining=Retraining(epochs=7, weights="reinit"))
    with pytest.raises(InputError, match=r"^retraining\.epochs: 0 is not allowed"):
        space().with_retraining(epochs=0)
