"""Batches of a data set on one device: gathered or streamed, augmented and normalised."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raytickets.config import Data, InputError
from raytickets.data import DataSet, Images, evaluation_batch
from raytickets.folder import Files


class Batches:
    """Batches of the three splits: images, float32 [N, channels, height, width] with the channels
    innermost in memory, normalised by the data set's mean and deviation; and labels, int64 [N].

    A split in memory is read where it lies, or moved to a GPU once if it takes up to a quarter of
    what this process may use there, all splits together; else batch by batch. Image files are
    decoded by `data.loader_workers` processes, which end with this object; batches are the same
    either way. A file that cannot be decoded raises InputError when its batch is due.
    """

    def __init__(self, dataset: DataSet, data: Data, device: torch.device | str = "cpu"):
        self.dataset = dataset
        self.device = torch.device(device)
        self.padding, self.flip = data.crop_padding, data.flip
        self.random_resized_crop = data.random_resized_crop
        splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
        self._labels = {name: _tensor(splits[name].labels).to(device) for name in splits}
        self._images, room = {}, _room(self.device)
        for name, split in splits.items():
            if isinstance(split, Images):
                images = _tensor(split.images)
                fits = images.nbytes <= room
                room -= images.nbytes if fits else 0
                self._images[name] = images.to(device) if fits else images
        files = {name: split for name, split in splits.items() if isinstance(split, Files)}
        self._decoders = Decoders(files, data.loader_workers, pin=self.device.type == "cuda")
        scale = 1 / torch.tensor(dataset.deviation)
        shift = -torch.tensor(dataset.mean) * scale
        # One value for each byte of a row of pixels: broadcasting over three channels is slow.
        self._scale = scale.repeat(dataset.shape.size).to(device)
        self._shift = shift.repeat(dataset.shape.size).to(device)

    def evaluation(
        self, split: str, size: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a split once, in order; `world` workers take the batches in turn.

        `size` is how many images a batch has, `evaluation_batch` of the images' size unless given.
        """
        size = size or evaluation_batch(self.dataset.shape.size)
        batches = torch.arange(len(self._labels[split])).split(size)[rank::world]
        if not batches:
            return
        places = torch.cat(batches)
        labels = self._labels[split][places.to(self.device)]
        pixels = self._pixels(split, places, size)
        for images, truth in zip(pixels, labels.split(size), strict=True):
            yield self._normalise(images), truth

    def count(self, size: int) -> int:
        """Training batches in an epoch: an incomplete last one is left out."""
        return max(len(self._labels["train"]) // size, 1)

    def training(
        self,
        size: int,
        generator: torch.Generator,
        rank: int = 0,
        world: int = 1,
        first: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled, cropped and flipped training batches, from the `first` on.

        Each of `world` workers, at most `size`, gets its own share of every batch, the first ones
        an image more where `world` does not divide it: together they have each image of the epoch
        once. The same generator seed on every rank gives the same order.
        """
        count, total = self.count(size), len(self._labels["train"])
        size = min(size, total)
        order = torch.randperm(total, generator=generator)
        shifts = torch.randint(2 * self.padding + 1, (2, total), generator=generator)
        flips = torch.rand(total, generator=generator) < 0.5
        seeds = None
        if self.random_resized_crop:
            seeds = torch.randint(2**63 - 1, (total,), generator=generator)
        places = order[: count * size].view(count, size)[first:, rank::world]
        # Moved once for the epoch: a GPU never waits for the next batch's.
        down, right = shifts[:, places].to(self.device)
        flipped = flips[places].to(self.device)
        labels = self._labels["train"][places.to(self.device)]
        pixels = self._pixels("train", places.flatten(), places.shape[1], seeds)
        for batch, images in enumerate(pixels):
            if self.padding:
                images = crop(images, self.padding, down[batch], right[batch])
            if self.flip:
                images = flip(images, flipped[batch])
            yield self._normalise(images), labels[batch]

    def _pixels(
        self, split: str, places: Tensor, size: int, seeds: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The images at these places as uint8 [size, height, width, channels] on the device.

        With seeds, one for each image of the split, they are random parts of the files' images.
        """
        if split in self._images:
            images = self._images[split]
            for batch in places.to(images.device).split(size):
                found = images.index_select(0, batch)
                if images.device.type != self.device.type:
                    found = found.pin_memory().to(self.device, non_blocking=True)
                yield found
        else:
            for images in self._decoders.decode(split, places, size, seeds):
                yield images.to(self.device, non_blocking=True)

    def _normalise(self, images: Tensor) -> Tensor:
        rows = images.view(-1, len(self._scale)).float().mul_(self._scale).add_(self._shift)
        return rows.view(images.shape).permute(0, 3, 1, 2)


def _room(device: torch.device) -> float:
    """Bytes of images that may lie on a device."""
    if device.type != "cuda":
        return float("inf")
    share = torch.cuda.get_per_process_memory_fraction()
    return share * torch.cuda.get_device_properties(device).total_memory / 4


def crop(images: Tensor, padding: int, down: Tensor, right: Tensor) -> Tensor:
    """Shift each image inside a border of zeros, as torchvision's RandomCrop with padding does.

    images is [N, height, width, channels]; down and right are int64 [N] from 0 to 2 * padding.
    """
    padded = F.pad(images, (0, 0, padding, padding, padding, padding)).contiguous()
    count, height, width, channels = padded.shape
    # Every window of the images' size in the padded batch, by the pixel of its upper left corner.
    last = ((count - 1) * height + 2 * padding) * width + 2 * padding
    sides = (width * channels, channels, 1)
    windows = padded.as_strided((last + 1, *images.shape[1:]), (channels, *sides))
    first = torch.arange(0, count * height * width, height * width, device=images.device)
    return windows.index_select(0, first + down * width + right)


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror left and right those images that are flipped: [N, height, width, channels], bool [N].

    What is picked from is every image both ways: copying whole images is faster than `where`.
    """
    count = len(images)
    both = torch.cat([images, images.flip(2)])
    return both.index_select(0, torch.arange(count, device=images.device) + count * flipped)


class Decoders:
    """Processes that decode batches of image files, kept from one iteration to the next."""

    def __init__(self, splits: Mapping[str, Files], workers: int, pin: bool):
        self._dataset, self._workers, self._pin = _Decoded(splits), workers, pin
        self._idle: list[tuple[list[Any], DataLoader]] = []

    def decode(
        self, split: str, places: Tensor, size: int, seeds: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Batches of `size` images, uint8 [size, height, width, 3], in page-locked memory if asked.

        With seeds, int64 and one for each image of the split, they are random parts of the images.
        Raises InputError if a file cannot be used.
        """
        # A DataLoader serves one iteration at a time, and the middle of an epoch is a time to
        # evaluate. One that was left before its end is not used again.
        tasks, loader = self._idle.pop() if self._idle else self._start()
        tasks[:] = [
            (split, batch.numpy(), None if seeds is None else seeds[batch].numpy())
            for batch in places.split(size)
        ]
        for images in loader:
            if isinstance(images, InputError):
                raise images
            yield images
        self._idle.append((tasks, loader))

    def _start(self) -> tuple[list[Any], DataLoader]:
        tasks: list[Any] = []
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=tasks,
            num_workers=self._workers,
            persistent_workers=True,
            pin_memory=self._pin,
            # Without one of its own, a DataLoader draws from torch's global generator.
            generator=torch.Generator(),
        )
        return tasks, loader


class _Decoded(Dataset):
    """What a worker process runs."""

    def __init__(self, splits: Mapping[str, Files]):
        self._splits = splits

    def __getitem__(self, task: tuple[str, np.ndarray, np.ndarray | None]) -> Tensor | InputError:
        split, places, seeds = task
        try:
            return torch.from_numpy(self._splits[split].pixels(places, 1, seeds))
        except InputError as error:
            return error  # A DataLoader cannot raise it again: it has three arguments.


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # Ray's object store lends read-only arrays, which torch warns of; they are only read.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
