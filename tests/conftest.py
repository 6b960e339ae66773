import gc
import logging
import os
import sys

import hypothesis
import pytest
import torch
from made_up_space import NETS, source, stand_in_for_ray

# The tests' arrays are small: several threads would only wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests leave nothing behind in the user's cache; those of the cache have one of their own.
os.environ["RAYTICKETS_CACHE"] = "off"
os.environ.pop("RAYTICKETS_STORAGE", None)

# A busy machine is no failure, and a run that fails is to fail again.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session")
def ray_instance():
    """The one Ray of the whole test run."""
    from raytickets.driver import ray  # which first sets what Ray reads when it is imported

    ray.init(
        "local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of all sweeps of a module's tests."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def store(place):
    return f"sqlite:///{place}/mlflow.db"


@pytest.fixture
def image_folder(tmp_path):
    """Writes an ImageFolder of noise: `image_folder({"train/cat": 3, ...})` gives its path."""
    import numpy as np
    from PIL import Image

    def write(counts, size=(8, 8)):
        generator = np.random.default_rng(0)
        root = tmp_path / "images"
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True)
            for place in range(count):
                pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{place}.png")
        return root

    return write


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """An empty working folder; the modules and import paths that a test adds go with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def folder(working_folder, image_folder):
    """A working folder with a good space and its images."""
    image_folder({"cat": 20, "dog": 20})
    (working_folder / "mine.py").write_text(source())
    (working_folder / "nets.py").write_text(NETS)
    return working_folder


@pytest.fixture
def cli(capsys, monkeypatch):
    """`cli("report", "x")` is the exit code of `raytickets report x`, its output and its errors."""

    from raytickets.cli import main

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["raytickets", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        gc.enable()
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refusal(cli, monkeypatch):
    """`refusal("search", "x")` is the one line with which bad input ends, before Ray starts."""
    stand_in_for_ray(monkeypatch, lambda *_, **__: pytest.fail("Ray was reached"))

    def call(*words):
        code, output, errors = cli(*words)
        assert code == 2
        assert output == ""
        assert errors.count("\n") == 1
        assert errors.startswith("raytickets: ")
        return errors.removeprefix("raytickets: ").rstrip()

    return call
