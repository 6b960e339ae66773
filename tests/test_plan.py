"""What a sweep is going to do is settled, and refused, before Ray starts."""

import dataclasses
import json

import pytest
from made_up_sweep import SPACE

from raytickets.config import Data, Halving, InputError, Network, Proof, StopRule, Training
from raytickets.journal import Journal
from raytickets.plan import make_plan


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


def begun(space, storage):
    """A plan whose opening is in the journal, as after a first run."""
    plan = make_plan(space, name="first", storage=storage)
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
    (before.folder / "journal.jsonl").write_text(json.dumps(altered) + "\n")
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
