"""Spaces are found by name, file and module; what goes wrong in them is told in one line."""

import dataclasses
import sys
import textwrap

import pytest

from raytickets.config import InputError, SearchSpace
from raytickets.plan import make_plan
from raytickets.spaces import built_in, load_space

SPACE = """
from raytickets.config import Data, Network, Retraining, SearchSpace, Training


def space(name="mine"):
    return SearchSpace(
        name=name,
        network=Network("cifar_vgg"),
        data=Data(),
        penalties=(1e-4,),
        prune_ratios=(0.5,),
        training=Training(epochs=5),
        retraining=Retraining(epochs=5),
    )


def other(smoke: bool = False):
    return space("smoke" if smoke else "other")
"""


def write(path, text=SPACE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.mark.parametrize("name", built_in())
def test_a_built_in_space_loads_by_its_name(name):
    assert load_space(name).name == name


PAPER = [name for name in built_in() if name.startswith(("cifar", "imagenet"))]
IMAGENET = [name for name in PAPER if name.startswith("imagenet")]


@pytest.mark.parametrize("name", PAPER)
def test_a_space_of_the_paper_has_its_recipe(name):
    space = load_space(name)
    recipe = space.retraining
    schedule = (90, (30, 60)) if name in IMAGENET else (160, (80, 120))
    assert (recipe.epochs, recipe.milestones) == schedule
    for part in (space.training, recipe):
        assert (part.batch_size, part.learning_rate) == (256, 0.1)
        assert (part.momentum, part.weight_decay) == (0.9, 1e-4)
    assert space.training.schedule == "constant"
    assert space.training.epochs == recipe.milestones[0]
    assert space.penalties == (1e-4,)
    assert space.prune_ratios == (0.3, 0.5, 0.7)


def made_up(name, space, image_folder):
    """The space on an ImageFolder of noise."""
    held_out = "val" if name in IMAGENET else "test"
    counts = {"train": 100, held_out: 3}
    path = image_folder(
        {f"{split}/{n}": count for split, count in counts.items() for n in range(4)},
        (40, 36) if name in IMAGENET else (32, 32),
    )
    return dataclasses.replace(
        space, data=dataclasses.replace(space.data, source="folder", path=str(path))
    )


def check_plan(name, smoke, image_folder, tmp_path):
    space = made_up(name, load_space(name, smoke=smoke), image_folder)
    opening = make_plan(space, name="first", storage=tmp_path / "sweeps").opening
    assert opening["space"]["name"] == space.name
    return opening


@pytest.mark.parametrize("name", PAPER)
def test_the_smoke_variant_of_a_space_can_be_searched(name, image_folder, tmp_path):
    assert not load_space(name, smoke=True).resources.gpus_per_trial
    check_plan(name, True, image_folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_a_space_of_the_paper_can_be_searched(name, image_folder, tmp_path):
    opening = check_plan(name, False, image_folder, tmp_path)
    widths = {"vgg16": 4224, "preresnet101": 2928, "resnet18": 2880, "resnet50": 11456}
    assert opening["channels"] == widths[name.partition("_")[2]]


@pytest.mark.parametrize("name", built_in())
def test_a_built_in_space_says_in_its_first_line_what_it_is(name):
    assert built_in()[name].read_text().startswith('"""')


@pytest.mark.parametrize(
    ("spec", "smoke", "name"),
    [
        ("nets.py", False, "mine"),
        ("nets.py:space", False, "mine"),
        ("nets.py:other", False, "other"),
        ("nets.py:other", True, "smoke"),
        ("./deep/down.py", False, "mine"),
        ("nets:space", False, "mine"),
        ("deep.down:other", True, "smoke"),
    ],
)
def test_a_space_of_the_users_own(working_folder, spec, smoke, name):
    for path in ("nets.py", "deep/down.py"):
        write(working_folder / path)
    assert load_space(spec, smoke=smoke).name == name


def test_a_file_can_import_what_lies_beside_it_and_in_the_working_folder(working_folder):
    write(working_folder / "here.py", SPACE)
    write(working_folder / "deep" / "beside.py", "NAME = 'found'")
    write(
        working_folder / "deep" / "mine.py",
        """
        import beside, here
        def space():
            return here.space(beside.NAME)
        """,
    )
    assert load_space("deep/mine.py").name == "found"


def test_the_users_files_do_not_stand_in_for_installed_packages(working_folder, monkeypatch):
    write(working_folder / "json.py", "raise RuntimeError")
    write(working_folder / "mine.py", "import json\n" + SPACE)
    monkeypatch.delitem(sys.modules, "json")
    assert load_space("mine.py").name == "mine"


def test_a_file_may_define_dataclasses(working_folder):
    write(
        working_folder / "mine.py",
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Mine:\n    value: int = 1\n" + SPACE,
    )
    assert isinstance(load_space("mine.py"), SearchSpace)


def test_a_changed_file_is_read_again(working_folder):
    write(working_folder / "mine.py")
    load_space("mine.py")
    write(working_folder / "mine.py", SPACE.replace('"mine"', '"changed"'))
    assert load_space("mine.py").name == "changed"


@pytest.mark.parametrize(
    ("spec", "text", "said"),
    [
        ("digit", "", "did you mean digits?"),
        ("imagenet", "", "must be one of .*digits"),
        ("missing.py", "", "no such file"),
        ("missing.module:space", "", "ModuleNotFoundError: No module named 'missing'"),
        (":space", "", "Empty module name"),
        ("mine.py", "def space(:", r"syntax error in line 1 of .*mine\.py"),
        ("mine.py", "import mine_too", r"ModuleNotFoundError in line 1 of .*mine\.py"),
        ("mine.py", "x = 1\ny = x.z", r"AttributeError in line 2 of .*mine\.py"),
        ("mine.py", "raise SystemExit(0)", "SystemExit in line 1"),
        ("mine.py", "pass", "must define a function `space`"),
        ("mine.py:two", "def space(): 1", "must define a function `two`"),
        ("mine:two", "two = 2", "must define a function `two`"),
        ("mine.py", "space = 3", "must define a function `space`"),
        ("mine.py", "class space: pass", "must return a SearchSpace, not space"),
        ("mine.py", "x = 1\0", "syntax error: source code string cannot contain null"),
        ("mine.py", "assert False, 'one\\ntwo'", "AssertionError in line 1 of .*: one two$"),
        ("mine.py", "def space():\n  return {}['key']", "KeyError in line 2 .*: 'key'"),
        ("mine.py", "def space():\n  exit()", "SystemExit in line 2"),
        ("mine.py", "def space(size): 1", "missing 1 required positional argument: 'size'"),
        ("mine.py", "def space(): 1", "must return a SearchSpace, not NoneType"),
        ("mine.py", "def space(): yield 1", "must return a SearchSpace, not generator"),
        ("mine.py", "def space(): return space()", "RecursionError in line 1 of"),
        ("mine.py", "def space():\n  raise ValueError('one\\ntwo')", "ValueError.*: one two$"),
    ],
)
def test_what_is_wrong_with_a_space_is_said_in_one_line(working_folder, spec, text, said):
    write(working_folder / "mine.py", text)
    with pytest.raises(InputError, match=rf"^space: '{spec}' is not allowed: .*{said}") as error:
        load_space(spec)
    assert "\n" not in str(error.value)


def test_an_input_error_of_the_space_itself_keeps_its_field(working_folder):
    write(working_folder / "mine.py", SPACE.replace("(0.5,)", "(1.5,)"))
    with pytest.raises(InputError, match=r"^prune_ratios: 1\.5 is not allowed"):
        load_space("mine.py")


def test_a_space_without_a_smoke_variant(working_folder):
    write(working_folder / "mine.py")
    with pytest.raises(InputError, match=r"^smoke: True is not allowed: .*mine\.py"):
        load_space("mine.py", smoke=True)
