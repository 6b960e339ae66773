"""Spaces are found by name, file and module; what goes wrong in them is told in one line."""

import sys
import textwrap

import pytest

from raytickets.config import InputError, SearchSpace
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


def test_a_built_in_space_has_a_smoke_variant_of_its_own():
    assert load_space("cifar10", smoke=True) != load_space("cifar10")


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
        ("mine.py", "def space():\n  return {}['key']", "KeyError in line 2 .*: 'key'"),
        ("mine.py", "def space():\n  exit()", "SystemExit in line 2"),
        ("mine.py", "def space(size): 1", "missing 1 required positional argument: 'size'"),
        ("mine.py", "def space(): 1", "must return a SearchSpace, not NoneType"),
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
