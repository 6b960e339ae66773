"""The wheel, in an environment that holds nothing else, searches from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UV = shutil.which("uv")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(UV is None, reason="uv builds and installs the wheel: pip install uv"),
]


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that knows nothing of this environment."""
    ours = ("VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `raytickets` command of a fresh environment with the wheel and the tested versions."""
    place = tmp_path_factory.mktemp("package")
    run("uv", "build", "--wheel", "--out-dir", place, ROOT, cwd=place)
    (wheel,) = place.glob("raytickets-*.whl")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = place / "pins.txt"
    pins.write_text("\n".join(project["tool"]["uv"]["constraint-dependencies"]))
    run("uv", "venv", "--python", sys.executable, "env", cwd=place)
    run("uv", "pip", "install", "--python", "env", "-c", pins, wheel, cwd=place)
    return place / "env" / "bin" / "raytickets"


def test_the_spaces_come_with_it(installed, tmp_path):
    assert "digits" in run(installed, "spaces", cwd=tmp_path)


def test_it_searches_to_the_end_in_an_empty_folder(installed, tmp_path):
    run(installed, "search", "digits", "--name", "first", cwd=tmp_path)
    report = json.loads(run(installed, "report", "first", "--json", cwd=tmp_path))
    assert report["state"] == "done"
    assert report["winners"]
    assert (tmp_path / "mlflow.db").is_file()
    assert run(installed, "show", report["winners"][0]["run"], cwd=tmp_path).startswith("Ticket")
