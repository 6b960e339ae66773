"""The rivals' images: the first of each class for training, the next ones for validation."""

from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from rivals import Settings
from torch.utils.data import Dataset, Subset

Arrays = tuple[np.ndarray, list[int]]
"""Decoded images, uint8 [N, height, width(, 3)], and their labels."""


def picks(labels: list[int], settings: Settings) -> tuple[list[int], list[int]]:
    """Places of the training images, the first of each class, and of the validation images."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    train, last = (n // len(places) for n in (settings.limit, settings.validation))
    if min(map(len, places.values())) < train + last:
        raise SystemExit(f"a class has fewer than {train} + {last} images")
    return (
        [place for of_class in places.values() for place in of_class[:train]],
        [place for of_class in places.values() for place in of_class[train : train + last]],
    )


def decode(settings: Settings) -> Arrays:
    """Every image that is used; folders are read in the order of torchvision's ImageFolder."""
    if settings.digits:
        # What sklearn.datasets.load_digits reads, without the seconds that its import takes.
        package = Path(str(find_spec("sklearn").origin)).parent
        rows = np.loadtxt(package / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.uint8)
        images = (rows[:, :-1] * (255 / 16)).round().astype(np.uint8)
        return images.reshape(-1, 8, 8), rows[:, -1].tolist()
    classes = sorted(path for path in (Path(settings.data) / "train").iterdir() if path.is_dir())
    files = [(path, label) for label, c in enumerate(classes) for path in sorted(c.iterdir())]
    train, validation = picks([label for _, label in files], settings)
    used = sorted(train + validation)
    images = [np.asarray(Image.open(files[place][0]).convert("RGB")) for place in used]
    return np.stack(images), [files[place][1] for place in used]


class Pictures(Dataset):
    """PIL images made of arrays in memory, as torchvision.datasets.CIFAR10 does."""

    def __init__(self, arrays: Arrays, transform):
        self.images, self.labels = arrays
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int):
        return self.transform(Image.fromarray(self.images[place])), self.labels[place]


def datasets(settings: Settings, crop: list, arrays: Arrays | None) -> tuple[Subset, Subset]:
    """Training images, which go through `crop` and random flips, and validation images.

    From `arrays` where they are given, else from the files, decoded again in every epoch.
    """
    from torchvision import datasets, transforms

    mean = (0.5,) if settings.digits else (0.4914, 0.4822, 0.4465)
    deviation = (0.5,) if settings.digits else (0.2023, 0.1994, 0.2010)
    plain = [transforms.ToTensor(), transforms.Normalize(mean, deviation)]
    flip = [] if settings.digits else [transforms.RandomHorizontalFlip()]
    both = transforms.Compose([*crop, *flip, *plain]), transforms.Compose(plain)
    if arrays is not None:
        found = [Pictures(arrays, transform) for transform in both]
        places = picks(arrays[1], settings)
    else:
        folder = str(Path(settings.data) / "train")
        found = [datasets.ImageFolder(folder, transform) for transform in both]
        places = picks(found[0].targets, settings)
    return Subset(found[0], places[0]), Subset(found[1], places[1])
