import logging
import os
import sys

import hypothesis
import pytest
import torch

# The tests' arrays are small: several threads would only wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure, and a run that fails is to fail again.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session")
def ray_instance():
    """The one Ray of the whole test run."""
    from raytickets.driver import ray  # which first sets what Ray reads when it is imported

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


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
