"""Imports go one way, slow packages are imported late, and the linters have nothing to say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str) -> None:
    """Run a tool of this environment on the project; fail with what it says."""
    tool = Path(sys.executable).parent / command[0]
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_keep_to_the_layers():
    run("lint-imports", "--no-cache")


def test_ruff_has_nothing_to_say():
    run("ruff", "check", ".")


def test_every_file_is_formatted():
    run("ruff", "format", "--check", "raytickets", "search_spaces", "cluster", "tests")


@pytest.mark.slow
def test_the_type_checker_has_nothing_to_say():
    run("pyright", "--pythonpath", sys.executable)


def test_bad_input_is_found_before_anything_slow_is_imported():
    slow = {"torch", "ray", "mlflow", "matplotlib", "torchvision", "sklearn"}
    program = f"import sys, raytickets.cli, raytickets.plan; print(*{slow} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done
