import logging
import os

import pytest
import torch

# The tests' arrays are small: several threads would only wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ray_instance():
    """The one Ray of the whole test run."""
    import ray

    import raytickets.driver  # noqa: F401  (sets what Ray reads when it is imported)

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
