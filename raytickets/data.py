"""Labelled images in three splits, as pixels in memory or as files to decode when they are used."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raytickets.config import Data, InputError
from raytickets.folder import Files, ImageFolder, list_folder, open_image, read_images
from raytickets.huggingface import Table, open_table
from raytickets.vision import read_cifar

EVALUATION_BATCH = 512
"""Images of up to 64 x 64 pixels that are looked at together; of larger ones there are fewer."""

_STATISTICS_SAMPLE = 2048
_STATISTICS_CHUNK = 64


@dataclass(frozen=True)
class Images:
    """One split in memory: uint8 images [N, height, width, channels] and int64 labels [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, places: np.ndarray) -> np.ndarray:
        return self.images[places]


@dataclass(frozen=True)
class DataSet:
    """Three disjoint splits of square labelled images of one size."""

    train: Images | Files
    validation: Images | Files
    test: Images | Files
    shape: "Shape"
    mean: tuple[float, ...]
    """Per channel, of at most 2,048 training images drawn by `data.split_seed`."""
    deviation: tuple[float, ...]
    """The standard deviation of the same pixels, at least 0.001."""
    fingerprint: str
    """SHA-256 over the three splits: of pixels and labels in memory, of relative paths, file sizes
    and labels in a stream. The same images have different ones in memory and in a stream."""


@dataclass(frozen=True)
class Shape:
    """What a network has to take and tell apart: square images, `size` pixels to a side."""

    channels: int
    size: int
    classes: tuple[str, ...]

    def example(self) -> Tensor:
        """Zeros, float32 [1, channels, size, size]."""
        return torch.zeros(1, self.channels, self.size, self.size)


def load_data(data: Data) -> DataSet:
    """Read, split and fingerprint the images that `data` names.

    Images that are streamed are only listed, but for those that mean and deviation are of. Their
    files have to be at the same path on every machine that trains.

    Raises InputError if the images are not where `data` says, they, their layout or one of them
    cannot be used, or memory is too small.
    """
    if data.source == "folder":
        shape, splits = _load_folder(data)
    elif data.source == "huggingface":
        shape, splits = _load_table(data)
    else:
        shape, splits = _load_arrays(data)
    mean, deviation = _statistics(splits["train"], data.split_seed)
    fingerprint = _fingerprint([splits[name] for name in ("train", "validation", "test")])
    return DataSet(**splits, shape=shape, mean=mean, deviation=deviation, fingerprint=fingerprint)


def describe(data: Data) -> Shape:
    """What `load_data` will give, from names and at most one image of a folder; the same errors."""
    if data.source == "digits":
        return Shape(channels=1, size=8, classes=tuple("0123456789"))
    if data.source == "folder":
        return _folder_shape(data, list_folder(data.path))
    if data.source == "huggingface":
        return _table_shape(data, open_table(data))
    return Shape(channels=3, size=32, classes=read_cifar(data, train=False)[2])


def _load_arrays(data: Data) -> tuple[Shape, dict[str, Images]]:
    """Digits and CIFAR."""
    if data.source == "digits":
        shape, (images, labels) = describe(data), _digits()
        given = {"train": np.arange(len(labels))}
    else:
        train, test = (read_cifar(data, train=train) for train in (True, False))
        shape = Shape(channels=3, size=32, classes=train[2])
        images, labels = (np.concatenate([train[part], test[part]]) for part in (0, 1))
        count = len(train[1])
        given = {"train": np.arange(count), "test": np.arange(count, len(labels))}
    places = _split(data, labels, given)
    return shape, {name: Images(images[at], labels[at]) for name, at in places.items()}


def _load_folder(data: Data) -> tuple[Shape, dict[str, Images] | dict[str, Files]]:
    folder = list_folder(data.path)
    shape = _folder_shape(data, folder)
    places = _split(data, folder.labels, folder.splits)
    files = folder.files(shape.size, data.image_size is not None, data.random_resized_crop)
    if _streams(data, _used(data, len(folder.paths)), shape.size):
        files = dataclasses.replace(files, root=str(folder.root.resolve()))
        return shape, {name: files.take(at) for name, at in places.items()}
    needed = np.unique(np.concatenate(list(places.values())))
    images = read_images(files, needed)
    return shape, {
        name: Images(images[np.searchsorted(needed, at)], folder.labels[at])
        for name, at in places.items()
    }


def _load_table(data: Data) -> tuple[Shape, dict[str, Images]]:
    table = open_table(data)
    shape = _table_shape(data, table)
    places = _split(data, table.labels, table.splits)
    resize = data.image_size is not None
    return shape, {
        name: Images(table.pixels(at, shape.size, resize), table.labels[at])
        for name, at in places.items()
    }


def _folder_shape(data: Data, folder: ImageFolder) -> Shape:
    size = data.image_size or _square(open_image(folder.root / folder.paths[0]))
    _streams(data, _used(data, len(folder.paths)), size)
    return Shape(channels=3, size=size, classes=folder.classes)


def _table_shape(data: Data, table: Table) -> Shape:
    size = data.image_size or _square(table.first())
    _check_memory(data, _used(data, len(table.labels)), size)
    return Shape(channels=3, size=size, classes=table.classes)


def _used(data: Data, count: int) -> int:
    """How many of so many images are used at most; no others are decoded."""
    return count if data.limit is None else min(count, 2 * data.limit)


def _square(image: Image.Image) -> int:
    if image.width != image.height:
        size = f"{image.width}x{image.height}"
        allowed = f"must be given, as the images are not square ({size} pixels)"
        raise InputError("data.image_size", None, allowed)
    return image.width


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container finds how much memory it may take, in bytes."""


def physical_memory() -> int:
    """This machine's memory in bytes, or what a container may take of it."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = [Path(path).read_text().strip() for path in _LIMITS if Path(path).exists()]
    return min([machine, *(int(limit) for limit in told if limit.isdigit())])


def _streams(data: Data, count: int, size: int) -> bool:
    """Whether so many images of a folder are streamed; InputError if memory is too small."""
    if data.loading == "memory":
        _check_memory(data, count, size)
    memory = physical_memory()
    batch = min(count, evaluation_batch(size))
    in_float32 = batch * 3 * size * size * 4
    if in_float32 > memory / 2:
        allowed = f"{batch} images at a time take {in_float32 >> 30} GiB, over half the memory"
        raise InputError("data.image_size", size, allowed)
    if data.random_resized_crop or data.loading == "stream":
        return True
    return data.loading == "auto" and count * 3 * size * size > memory / 4


def evaluation_batch(size: int) -> int:
    """How many images of size x size pixels are looked at together: as many pixels at most."""
    return max(1, min(EVALUATION_BATCH, EVALUATION_BATCH * 64 * 64 // size**2))


def _check_memory(data: Data, count: int, size: int) -> None:
    needed = count * 3 * size * size
    if needed > physical_memory() / 2:
        taken = f"{count} images of {size} pixels take {needed >> 30} GiB, over half the memory"
        if data.source == "folder":
            allowed = f"{taken}: choose `stream`, or a smaller data.image_size"
            raise InputError("data.loading", data.loading, allowed)
        raise InputError("data.image_size", data.image_size, f"{taken}: choose a smaller one")


def _digits() -> tuple[np.ndarray, np.ndarray]:
    # What sklearn.datasets.load_digits reads, without the 4 s that its import takes.
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "datasets/data/digits.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    images = (rows[:, :-1] * (255 / 16)).round().astype(np.uint8)
    return images.reshape(-1, 8, 8, 1), rows[:, -1].astype(np.int64)


def _split(
    data: Data, labels: np.ndarray, given: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The places of every split's images among the labels, where some splits are given."""
    generator = np.random.default_rng(data.split_seed)
    shares = {"validation": data.validation, "test": data.test}
    missing = {name: share for name, share in shares.items() if name not in given}
    splits = {**given, **_carve(labels, given["train"], missing, generator)}
    if data.limit is not None:
        most = {"train": data.limit, "validation": data.limit // 2, "test": data.limit // 2}
        for name, places in splits.items():
            splits[name] = places[generator.permutation(len(places))[: most[name]]]
    for name, places in splits.items():
        if not len(places):
            share = "test" if name == "test" else "validation"
            allowed = f"leaves {name} without images"
            raise InputError(f"data.{share}", shares.get(share), allowed)
    return splits


def _carve(
    labels: np.ndarray,
    train: np.ndarray,
    shares: Mapping[str, float],
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Split off these shares of every class of the training images; what is left is `train`."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in [*shares, "train"]}
    for label in np.unique(labels):
        places = generator.permutation(train[labels[train] == label])
        total = len(places)
        for name, share in shares.items():
            count = round(share * total)
            parts[name].append(places[:count])
            places = places[count:]
        parts["train"].append(places)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def _statistics(train: Images | Files, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, from whole numbers: exact in any order."""
    places = np.arange(len(train))
    if len(train) > _STATISTICS_SAMPLE:
        drawn = np.random.default_rng(seed).choice(places, _STATISTICS_SAMPLE, replace=False)
        places = np.sort(drawn)
    counts = np.zeros(1, np.int64)
    for start in range(0, len(places), _STATISTICS_CHUNK):
        pixels = train.pixels(places[start : start + _STATISTICS_CHUNK])
        channels = pixels.reshape(-1, pixels.shape[-1]).T
        counts = counts + np.stack([np.bincount(c, minlength=256) for c in channels])
    values, total = np.arange(256), counts.sum(1)
    mean = counts @ values / total
    variance = (counts @ values**2 / total - mean**2).clip(min=1e-6)
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def _fingerprint(splits: list[Images | Files]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        if isinstance(split, Images):
            digest.update(split.images.data)
        else:
            digest.update(b"\0".join(split.paths.tolist()))
            digest.update(split.stats()[:, 0].tobytes())
        digest.update(split.labels.data)
    return digest.hexdigest()
