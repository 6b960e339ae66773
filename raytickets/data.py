"""Labelled images as uint8 arrays: reading, splitting and batching them."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from raytickets.config import Data, InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
"""Files with these endings are images, as in torchvision's ImageFolder."""


@dataclass(frozen=True)
class Images:
    """One split: uint8 images [N, channels, height, width] and int64 labels [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: np.ndarray) -> "Images":
        return Images(self.images[places], self.labels[places])


@dataclass(frozen=True)
class DataSet:
    """Three disjoint splits of square labelled images of one size."""

    train: Images
    validation: Images
    test: Images
    shape: "Shape"
    fingerprint: str
    """SHA-256 over the images and labels of the three splits."""


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

    Raises InputError if the folder, its layout or an image cannot be used.
    """
    shape = describe(data)
    if data.source == "digits":
        splits = {"train": _digits()}
    else:
        crop = data.image_size is not None
        splits = {n: _decode(files, shape.size, crop) for n, files in _list_splits(data).items()}
    generator = np.random.default_rng(data.split_seed)
    shares = {"validation": data.validation, "test": data.test}
    missing = {name: share for name, share in shares.items() if name not in splits}
    splits |= _carve(splits["train"], missing, len(shape.classes), generator)
    if data.limit is not None:
        most = {"train": data.limit, "validation": data.limit // 2, "test": data.limit // 2}
        for name, split in splits.items():
            splits[name] = split.take(generator.permutation(len(split))[: most[name]])
    digest = hashlib.sha256()
    for name in ("train", "validation", "test"):
        if not len(splits[name]):
            raise InputError(f"data.{name}", shares.get(name), "leaves this split without images")
        digest.update(splits[name].images.tobytes())
        digest.update(splits[name].labels.tobytes())
    return DataSet(**splits, shape=shape, fingerprint=digest.hexdigest())


def _digits() -> Images:
    # What sklearn.datasets.load_digits reads, without the 4 s that its import takes.
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "datasets/data/digits.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    images = (rows[:, :-1] * (255 / 16)).round().astype(np.uint8)
    return Images(images.reshape(-1, 1, 8, 8), rows[:, -1].astype(np.int64))


def _carve(
    images: Images, shares: Mapping[str, float], classes: int, generator: np.random.Generator
) -> dict[str, Images]:
    """Split off these shares of every class; what is left is `train`."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in [*shares, "train"]}
    for label in range(classes):
        places = generator.permutation(np.flatnonzero(images.labels == label))
        for name, share in shares.items():
            count = round(share * (images.labels == label).sum())
            parts[name].append(places[:count])
            places = places[count:]
        parts["train"].append(places)
    return {name: images.take(np.sort(np.concatenate(part))) for name, part in parts.items()}


def list_images(folder: Path, classes: tuple[str, ...] | None = None) -> dict[str, list[Path]]:
    """The image files of an ImageFolder by class, both sorted by name.

    Raises InputError if a class folder holds no image, there are fewer than two classes, or the
    classes are not the given ones.
    """
    found: dict[str, list[Path]] = {}
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(path for path in child.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError("data.path", str(child), "this class folder holds no image")
        found[child.name] = files
    if len(found) < 2:
        allowed = "must hold at least two class folders with images, <class>/<image>"
        raise InputError("data.path", str(folder), allowed)
    if classes is not None and tuple(found) != classes:
        allowed = f"must have the same class folders as train/, which are {', '.join(classes)}"
        raise InputError("data.path", str(folder), allowed)
    return found


def _list_splits(data: Data) -> dict[str, dict[str, list[Path]]]:
    root = Path(str(data.path)).expanduser()
    if not root.is_dir():
        allowed = "must be a folder with train/<class>/<image> and test/<class>/<image>"
        raise InputError("data.path", data.path, allowed)
    folders = {name: root / name for name in ("train", "validation", "test")}
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    if "train" not in folders:
        folders = {"train": root}
    splits = {"train": list_images(folders.pop("train"))}
    classes = tuple(splits["train"])
    return splits | {name: list_images(folder, classes) for name, folder in folders.items()}


def describe(data: Data) -> Shape:
    """What `load_data` will give, from file names and one image; the same errors."""
    if data.source == "digits":
        return Shape(channels=1, size=8, classes=tuple("0123456789"))
    splits = _list_splits(data)
    classes = tuple(splits["train"])
    size = data.image_size
    if size is None:
        width, height = _open(splits["train"][classes[0]][0]).size
        if width != height:
            allowed = f"must be given, as the images are not square ({width}x{height} pixels)"
            raise InputError("data.image_size", None, allowed)
        size = width
    count = sum(len(paths) for split in splits.values() for paths in split.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (needed := count * 3 * size * size) > memory / 2:
        allowed = f"{count} images of {size} pixels take {needed >> 30} GiB, over half the memory"
        raise InputError("data.image_size", size, allowed)
    return Shape(channels=3, size=size, classes=classes)


def _decode(files: dict[str, list[Path]], size: int, crop: bool) -> Images:
    paths = [path for split in files.values() for path in split]
    labels = np.repeat(np.arange(len(files)), [len(split) for split in files.values()])
    images = np.empty((len(paths), 3, size, size), dtype=np.uint8)

    def decode(place: int) -> None:
        image = _open(paths[place])
        if crop:
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        elif image.size != (size, size):
            allowed = f"must be given, as images differ in size ({paths[place]})"
            raise InputError("data.image_size", None, allowed)
        images[place] = np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(len(paths))):
            pass
    return Images(images, labels.astype(np.int64))


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError("data.path", str(path), f"is not a readable image ({error})") from error


class Batches:
    """Batches of one split as normalised float32 tensors on one device.

    Normalisation takes mean and standard deviation over the training images, per channel.
    """

    def __init__(self, dataset: DataSet, data: Data, device: torch.device | str = "cpu"):
        self.dataset = dataset
        self.dataset = dataset
        self.device = torch.device(device)
        self.padding, self.flip = data.crop_padding, data.flip
        self._splits = {
            name: (_tensor(split.images, device), _tensor(split.labels, device))
            for name in ("train", "validation", "test")
            for split in [getattr(dataset, name)]
        }
        pixels = dataset.train.images.astype(np.float32)
        mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        self._mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self._deviation = torch.tensor(deviation, device=device).view(-1, 1, 1).clamp(min=1e-3)

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() - self._mean) / self._deviation

    def evaluation(self, split: str, size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a split once, in order."""
        images, labels = self._splits[split]
        for start in range(0, len(labels), size):
            yield self._normalise(images[start : start + size]), labels[start : start + size]

    def count(self, size: int) -> int:
        """Training batches in an epoch: an incomplete last one is left out."""
        return max(len(self._splits["train"][1]) // size, 1)

    def training(
        self, size: int, generator: torch.Generator, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled, cropped and flipped training batches.

        Each of `world` workers gets its own `size / world` images of every batch; the same
        generator seed on every rank gives the same order.
        """
        images, labels = self._splits["train"]
        order = torch.randperm(len(labels), generator=generator)
        reach = 2 * self.padding + 1
        shifts = torch.randint(reach, (2, len(labels)), generator=generator)
        flips = torch.rand(len(labels), generator=generator) < 0.5
        for batch in range(self.count(size)):
            places = order[batch * size : (batch + 1) * size][rank::world]
            picked = images[places.to(self.device)]
            if self.padding:
                picked = crop(picked, self.padding, *shifts[:, places].to(self.device))
            if self.flip:
                flipped = flips[places].to(self.device)[:, None, None, None]
                picked = torch.where(flipped, picked.flip(-1), picked)
            yield self._normalise(picked), labels[places.to(self.device)]


def _tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    with warnings.catch_warnings():
        # Ray's object store lends read-only arrays, which torch warns of; they are only read.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array).to(device)


def crop(images: Tensor, padding: int, down: Tensor, right: Tensor) -> Tensor:
    """Shift each image inside a border of zeros, as torchvision's RandomCrop with padding does.

    images is [N, channels, height, width]; down and right are int64 [N] from 0 to 2 * padding.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=images.device), :, down, right]
