"""An ImageFolder: the images it holds, decoding them, and the cache of what was decoded."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import PIL
from PIL import Image, ImageOps

from raytickets.config import InputError, expanded

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Files with these endings are images, as in torchvision's ImageFolder."""

_VALIDATION = ("validation", "val", "valid")
HELD_OUT = (*_VALIDATION, "test")
"""Names of the splits beside `train`; `val` and `valid` are `validation`."""

_Split = TypeVar("_Split")

_TASK = 64  # images that one task of a thread decodes
_CACHE_FORMAT = 2
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Files:
    """Image files that decode to uint8 [N, size, size, 3], and their labels, int64 [N].

    `paths` are relative to `root` and bytes [N]: one array, which Ray's object store lends to
    every process without a copy.
    """

    root: str
    paths: np.ndarray
    labels: np.ndarray
    size: int
    resize: bool
    """Resize and centre-crop to `size`; without it the files must have it."""
    random_resized_crop: bool = False
    """Crop as `Data.random_resized_crop` says."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: np.ndarray) -> "Files":
        return dataclasses.replace(self, paths=self.paths[places], labels=self.labels[places])

    def pixels(
        self, places: np.ndarray, threads: int | None = None, seeds: np.ndarray | None = None
    ) -> np.ndarray:
        """Decode these images, uint8 [n, size, size, 3]; `threads` is one for each CPU by default.

        seeds, int64 [n], are what random parts of the images are drawn by; without them images are
        centre-cropped. Raises InputError that names the first file that cannot be used.
        """
        images = np.empty((len(places), self.size, self.size, 3), np.uint8)

        def decode(start: int) -> None:
            for at in range(start, min(start + _TASK, len(places))):
                seed = None if seeds is None else int(seeds[at])
                images[at] = np.asarray(self._decode(self._path(places[at]), seed))

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            for _ in pool.map(decode, range(0, len(places), _TASK)):
                pass
        return images

    def stats(self) -> np.ndarray:
        """Size in bytes and modification time in ns of every file, int64 [N, 2]."""
        found = np.empty((len(self), 2), np.int64)
        for place in range(len(self)):
            path = self._path(place)
            try:
                stat = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from error
            found[place] = stat.st_size, stat.st_mtime_ns
        return found

    def _path(self, place: int) -> Path:
        return Path(self.root, os.fsdecode(self.paths[place]))

    def _decode(self, path: Path, seed: int | None) -> Image.Image:
        image = open_image(path)
        if seed is not None:
            part = image.crop(random_part(image.width, image.height, np.random.default_rng(seed)))
            return part.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if self.random_resized_crop:
            return _centre(image, self.size)
        return fit(image, self.size, self.resize, str(path))


def fit(image: Image.Image, size: int, resize: bool, name: str) -> Image.Image:
    """The centre of an image, resized; without `resize`, the image if it has the size.

    Raises InputError with the image's name if it has not.
    """
    if resize:
        return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    if image.size != (size, size):
        allowed = f"must be given, as images differ in size ({name})"
        raise InputError("data.image_size", None, allowed)
    return image


def random_part(
    width: int, height: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A part of an image, drawn as torchvision's RandomResizedCrop does: left, top, right, bottom.

    The part has 8 to 100% of the area, and sides from 3:4 to 4:3; where ten draws do not lie in
    the image, it is the largest part from the centre whose sides are in that range.
    """
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            top = int(generator.integers(height - high + 1))
            left = int(generator.integers(width - wide + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _centre(image: Image.Image, size: int) -> Image.Image:
    """What torchvision's Resize(size / 0.875) and CenterCrop(size) give."""
    short = round(size / 0.875)
    if image.width <= image.height:
        width, height = short, int(short * image.height / image.width)
    else:
        width, height = int(short * image.width / image.height), short
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class ImageFolder:
    """The image files of all splits, one split after the other, each by class and name."""

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    """Relative to the root."""
    labels: np.ndarray
    splits: Mapping[str, np.ndarray]
    """Which of the files are each split's; `train` is always there."""

    def files(self, size: int, resize: bool, random_resized_crop: bool = False) -> Files:
        paths = np.array([os.fsencode(path) for path in self.paths])
        return Files(str(self.root), paths, self.labels, size, resize, random_resized_crop)


def list_folder(path: str | None) -> ImageFolder:
    """Read the file names of `train/<class>/*` (and `validation/`, `val/` or `valid/`, `test/`) or
    plain `<class>/*`.

    Raises InputError if there is no such folder, a class folder holds no image, there are fewer
    than two classes, the splits differ in their classes, or classes seem to be splits.
    """
    root = expanded("data.path", path)
    if not root.is_dir():
        allowed = "must be a folder with train/<class>/<image> and test/<class>/<image>"
        raise InputError("data.path", path, allowed)
    folders = {name: root / name for name in ("train", *HELD_OUT)}
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    if "train" in folders:
        folders = held_out(folders, path)
    else:
        _check_no_splits(root)
        folders = {"train": root}
    classes, paths, labels, splits = None, [], [], {}
    for name, folder in folders.items():
        found = _list_classes(folder, classes)
        classes, start = tuple(found), len(paths)
        for label, files in enumerate(found.values()):
            paths += [os.path.relpath(file, root) for file in files]
            labels += [label] * len(files)
        splits[name] = np.arange(start, len(paths))
    assert classes is not None
    return ImageFolder(root, classes, tuple(paths), np.array(labels, np.int64), splits)


def held_out(splits: Mapping[str, _Split], path: str | None) -> dict[str, _Split]:
    """The splits under their names here: `val` is validation, and the test split if there is none.

    Raises InputError if validation is there under two names.
    """
    named = dict(splits)
    if found := [name for name in _VALIDATION if name in named]:
        if len(found) > 1:
            raise InputError("data.path", path, f"must have one of {' and '.join(found)}, not both")
        named["validation"] = named.pop(found[0])
    if "test" not in named and "validation" in named:
        named["test"] = named.pop("validation")
    return named


def _check_no_splits(root: Path) -> None:
    """InputError if folders that would be classes are two splits, like seg_train and seg_test."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(child.name for child in root.iterdir() if child.is_dir()):
        kinds = {"train": "train(ing)?", "test": "test(ing)?|val(id(ation)?)?"}
        for kind, words in kinds.items():
            if match := re.fullmatch(f"(.*?)({words})", name.lower()):
                found.setdefault(match[1], {})[kind] = name
    for splits in found.values():
        if len(splits) == 2:
            allowed = f"holds {splits['train']} and {splits['test']}, to be called train and test"
            raise InputError("data.path", str(root), allowed)


def _list_classes(folder: Path, classes: tuple[str, ...] | None) -> dict[str, list[str]]:
    """The image files of every class, both sorted; the classes must be the given ones, if any."""
    found: dict[str, list[str]] = {}
    try:
        children = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        _refuse(error)
    for child in children:
        files = []
        for place, folders, names in os.walk(child, onerror=_refuse, followlinks=True):
            here = Path(place).resolve()
            for link in (Path(place, name) for name in folders):
                if here.is_relative_to(link.resolve()):
                    raise InputError("data.path", str(link), "must not lead back to where it is")
            files += [f"{place}/{name}" for name in names if name.lower().endswith(SUFFIXES)]
        if not files:
            raise InputError("data.path", str(child), "this class folder holds no image")
        found[child.name] = sorted(files)
    if len(found) < 2:
        allowed = "must hold at least two class folders with images, <class>/<image>"
        raise InputError("data.path", str(folder), allowed)
    if classes is not None and tuple(found) != classes:
        allowed = f"must have the same class folders as train/, which are {', '.join(classes)}"
        raise InputError("data.path", str(folder), allowed)
    return found


def _refuse(error: OSError) -> NoReturn:
    raise InputError("data.path", error.filename, f"cannot be read ({error.strerror})") from error


def open_image(path: Path) -> Image.Image:
    """The image in RGB; InputError that names the file if it cannot be read."""
    try:
        return in_rgb(Image.open(path))
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files.
        raise _unreadable(path, error) from error


def in_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, as torchvision reads it; ValueError if its pixels have no known range.

    But 16 bits of grey become 8, where Pillow would make white of all but the darkest.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no known range")
    return image.convert("RGB")


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError("data.path", str(path), f"is not a readable image ({error})")


def read_images(files: Files, places: np.ndarray | None = None) -> np.ndarray:
    """Images, uint8 [n, size, size, 3] and read-only: from the cache, or decoded and cached.

    They are those at `places`, int64 [n], or all. The cache is `$XDG_CACHE_HOME/raytickets`
    (`~/.cache/raytickets`), unless `RAYTICKETS_CACHE` is `0` or `off`. An entry is a .npy file with
    its SHA-256 after it; a folder has one of all its images and one of a part at a time. One that
    is damaged is decoded anew, and one that cannot be written costs a warning.
    """
    entry = _cache_entry(files)
    if places is not None and len(places) < len(files):
        images = None if entry is None else _read(entry)
        if images is not None:
            return images[places]
        files = files.take(places)
        entry = _cache_entry(files, "part")
    images = None if entry is None else _read(entry)
    if images is None:
        images = files.pixels(np.arange(len(files)))
        if entry is not None:
            _write(entry, images)
    return images


def _cache_entry(files: Files, kind: str = "") -> Path | None:
    """Where these images are cached: `<the folder's hash>-<the hash of all they depend on>.npy`."""
    if os.environ.get("RAYTICKETS_CACHE", "").lower() in ("0", "off"):
        return None
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        _warn(f"decoded images are not cached: {error}")
        return None
    root = os.fsencode(Path(files.root).resolve())
    rules = [_CACHE_FORMAT, PIL.__version__, files.size, files.resize]
    key = hashlib.sha256(json.dumps(rules).encode())
    for part in (root, *files.paths.tolist(), files.stats().tobytes()):
        key.update(part + b"\0")
    folder = hashlib.sha256(root + kind.encode()).hexdigest()[:16]
    return home / "raytickets" / f"{folder}-{key.hexdigest()[:32]}.npy"


def _read(entry: Path) -> np.ndarray | None:
    try:
        content = np.memmap(entry, np.uint8, "r")
        if hashlib.sha256(content[:-_DIGEST].data).digest() == content[-_DIGEST:].tobytes():
            return np.asarray(np.load(entry, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError):
        pass
    return None


def _write(entry: Path, images: np.ndarray) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".tmp", entry.stem, entry.parent)
        try:
            with os.fdopen(handle, "w+b") as file:
                np.save(file, images)
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").digest()
                file.write(digest)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(entry)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _delete_older(entry)
    except OSError as error:
        _warn(f"decoded images are not cached: {error}")


def _delete_older(entry: Path) -> None:
    """Delete the folder's other entries, and what writers left that were killed a day ago."""
    folder = entry.name.partition("-")[0]
    for other in entry.parent.glob(f"{folder}-*"):
        with contextlib.suppress(FileNotFoundError):
            killed = other.suffix == ".tmp" and time.time() - other.stat().st_mtime > 24 * 3600
            if killed or (other.suffix == ".npy" and other != entry):
                other.unlink()


@functools.cache
def _warn(message: str) -> None:
    logging.getLogger(__name__).warning("raytickets: %s", message)
