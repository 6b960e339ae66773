"""Image data sets of Hugging Face, through its library `datasets` (the extra `huggingface`)."""

import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from raytickets.config import Data, InputError, expanded
from raytickets.folder import HELD_OUT, fit, held_out, in_rgb

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_CHUNK = 1024  # images whose bytes are read at a time


@dataclass(frozen=True)
class Table:
    """The rows of all splits, one split after the other, with their images still encoded."""

    path: str
    rows: "Dataset"
    """Has the columns `image`, a dict of bytes and path, and `label`."""
    labels: np.ndarray
    classes: tuple[str, ...]
    splits: Mapping[str, np.ndarray]
    """Which of the rows are each split's; `train` is always there."""

    def first(self) -> Image.Image:
        """The first training image."""
        return self._open(0, self.rows[0]["image"])

    def pixels(self, places: np.ndarray, size: int, resize: bool) -> np.ndarray:
        """Decode these images, uint8 [n, size, size, 3]; InputError names one that cannot be."""
        images = np.empty((len(places), size, size, 3), np.uint8)

        def decode(at: int, image: Mapping[str, Any] | None) -> None:
            place = places[at]
            images[at] = np.asarray(fit(self._open(place, image), size, resize, f"row {place}"))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(places), _CHUNK):
                chunk = self.rows[places[start : start + _CHUNK]]["image"]
                list(pool.map(decode, range(start, start + len(chunk)), chunk))
        return images

    def _open(self, place: int, image: Mapping[str, Any] | None) -> Image.Image:
        """The image in RGB, the right way up as the library itself decodes it."""
        given = image or {"bytes": None, "path": None}
        try:
            found = Image.open(io.BytesIO(given["bytes"]) if given["bytes"] else given["path"])
            return in_rgb(ImageOps.exif_transpose(found))
        except Exception as error:  # Pillow's decoders raise many kinds on damaged files.
            allowed = f"has no readable image in row {place} ({error})"
            raise InputError("data.path", given["path"] or self.path, allowed) from error


def open_table(data: Data) -> Table:
    """The data set at `data.path`: a folder, or a name on the Hub with `data.download`.

    Raises InputError if the library is not installed, the data set cannot be read, or columns and
    splits are not those of labelled images.
    """
    tables = _load(data)
    if "train" not in tables:
        allowed = f"must have a split called train, not only {', '.join(map(str, tables))}"
        raise InputError("data.path", data.path, allowed)
    image, label = data.columns or _find_columns(tables["train"], data)
    parts, classes = {}, None
    for name in ("train", *HELD_OUT):
        if name in tables:
            part = _two_columns(tables[name], data, image, label)
            if classes is None:
                classes = _classes(part, data)
            labels = _labels(part, data, classes)
            # The test images of some data sets have -1 in place of the labels that are kept secret.
            if name == "train" or not (labels == -1).all():
                parts[name] = part, labels
    assert classes is not None
    parts = held_out(parts, data.path)
    splits, start = {}, 0
    for name, (part, _) in parts.items():
        splits[name] = np.arange(start, start + len(part))
        start += len(part)

    from datasets import concatenate_datasets

    rows = concatenate_datasets([part for part, _ in parts.values()])
    labels = np.concatenate([labels for _, labels in parts.values()])
    if not len(splits["train"]) or (labels < 0).any():
        allowed = f"must have rows, and a class in the column {label} of every one"
        raise InputError("data.path", data.path, allowed)
    if len(classes) < 2:
        allowed = f"must have at least two classes in the column {label}, not {len(classes)}"
        raise InputError("data.path", data.path, allowed)
    return Table(str(data.path), rows, labels, classes, splits)


def _load(data: Data) -> "DatasetDict | dict[str, Dataset]":
    try:
        from datasets import Dataset, load_dataset, load_from_disk
    except ImportError as error:
        allowed = f"needs raytickets with its extra huggingface ({error})"
        raise InputError("data.source", data.source, allowed) from error
    folder = expanded("data.path", data.path)
    if not folder.is_dir() and not data.download:
        allowed = "is no folder here; download=True fetches a data set of this name from the Hub"
        raise InputError("data.path", data.path, allowed)
    saved = ("dataset_dict.json", "state.json")
    try:
        if any((folder / name).is_file() for name in saved):
            found = load_from_disk(str(folder))
        else:
            found = load_dataset(str(folder.resolve()) if folder.is_dir() else str(data.path))
    except Exception as error:  # What is wrong with a file or a server comes in many kinds.
        allowed = f"datasets cannot read it: {type(error).__name__}: {error}"
        raise InputError("data.path", data.path, allowed) from error
    return {"train": found} if isinstance(found, Dataset) else found


def _find_columns(table: "Dataset", data: Data) -> tuple[str, str]:
    import datasets

    features = table.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(labels) != 1:
        labels = [name for name in ("label", "fine_label", "labels") if name in features][:1]
    if len(images) != 1 or not labels:
        allowed = f"must name the columns of images and labels, which are of {', '.join(features)}"
        raise InputError("data.columns", data.columns, allowed)
    return images[0], labels[0]


def _two_columns(table: "Dataset", data: Data, image: str, label: str) -> "Dataset":
    import datasets

    for name in (image, label):
        if name not in table.features:
            allowed = f"must be two of {', '.join(table.features)}"
            raise InputError("data.columns", data.columns, allowed)
    if not isinstance(table.features[image], datasets.Image):
        allowed = f"{image} must be a column of images, not {table.features[image]}"
        raise InputError("data.columns", data.columns, allowed)
    table = table.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    return table.cast_column("image", datasets.Image(decode=False))


def _classes(table: "Dataset", data: Data) -> tuple[str, ...]:
    from datasets import ClassLabel

    kind = table.features["label"]
    if isinstance(kind, ClassLabel):
        return tuple(kind.names)
    values = table["label"][:]
    if any(value is None or isinstance(value, list | dict) for value in values):
        raise InputError("data.path", data.path, "must have one label in every row")
    return tuple(map(str, sorted(set(values))))


def _labels(table: "Dataset", data: Data, classes: tuple[str, ...]) -> np.ndarray:
    """Places among the classes, int64 [N], or -1 where there is none."""
    from datasets import ClassLabel

    values, kind = table["label"][:], table.features["label"]
    if isinstance(kind, ClassLabel):
        if tuple(kind.names) != classes:
            raise InputError("data.path", data.path, "must have the same classes in every split")
        return np.array([-1 if value is None else value for value in values], np.int64)
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted({str(value) for value in values} - numbers.keys())
    if unknown and unknown != ["-1"]:
        allowed = f"a split has labels that train has not: {', '.join(unknown[:5])}"
        raise InputError("data.path", data.path, allowed)
    return np.array([numbers.get(str(value), -1) for value in values], np.int64)
