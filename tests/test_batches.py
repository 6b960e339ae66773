"""Batches are shuffled, shared out and augmented as torchvision would, from memory or a stream."""

import dataclasses
import gc
import multiprocessing
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytickets.batches import Batches, crop, flip
from raytickets.config import Data, InputError
from raytickets.data import DataSet, Images, Shape, load_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def assert_equal(ours, theirs):
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
        assert images.stride() == other_images.stride()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def transforms():
    """torchvision.transforms, without the torch._dynamo that other parts of torchvision import."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch._dynamo.utils" not in sys.modules:
            answer = SimpleNamespace(is_compile_supported=lambda _: False)
            patch.setitem(sys.modules, "torch._dynamo.utils", answer)
        import torchvision.transforms
    return torchvision.transforms


def one_image_set(images):
    """A data set whose splits are all these images [N, height, width, channels], not normalised."""
    labels = np.arange(len(images))
    split = Images(images, labels.astype(np.int64))
    channels = images.shape[-1]
    shape = Shape(channels, images.shape[1], tuple(map(str, labels)))
    return DataSet(split, split, split, shape, (0.0,) * channels, (1.0,) * channels, "")


def test_an_epoch_has_every_image_once_and_workers_share_each_batch():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    batches = Batches(one_image_set(images), Data("digits"))
    whole = [labels for _, labels in batches.training(8, seeded(0))]
    assert sorted(torch.cat(whole).tolist()) == list(range(40))
    halves = [[labels for _, labels in batches.training(8, seeded(0), r, 2)] for r in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert [part.tolist() for part in parts] == [batch[0::2].tolist(), batch[1::2].tolist()]


def test_what_does_not_fit_on_a_device_goes_there_batch_by_batch(monkeypatch):
    """On torch's device that holds nothing, as there may be no GPU."""
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    monkeypatch.setattr("raytickets.batches._room", lambda _: 100)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    batches = Batches(one_image_set(images), Data("digits"), "meta")
    places = [images.device.type for images in batches._images.values()]
    assert places == ["meta", "meta", "cpu"]
    for split in ("train", "test"):
        assert [image.device.type for image, _ in batches.evaluation(split, 16)] == ["meta"] * 3


@given(total=st.integers(2, 80), size=st.integers(2, 30), seed=st.integers(0, 9), data=st.data())
def test_any_number_of_workers_has_the_batches_of_one(total, size, seed, data):
    """No image is lost or doubled, and a batch stays as large as it was."""
    world = data.draw(st.integers(1, min(size, total)))
    images = np.arange(total, dtype=np.uint8).reshape(total, 1, 1, 1)
    batches = Batches(one_image_set(images), Data("digits"))
    whole = [labels for _, labels in batches.training(size, seeded(seed))]
    parts = [list(batches.training(size, seeded(seed), rank, world)) for rank in range(world)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(torch.cat([labels for _, labels in shares]).tolist()) == sorted(
            batch.tolist()
        )
        counts = [len(labels) for _, labels in shares]
        assert max(counts) - min(counts) <= 1
        for pixels, labels in shares:
            assert pixels.flatten().tolist() == labels.tolist()
    seen = torch.cat(whole).tolist()
    assert len(set(seen)) == len(seen) == max(total // size * size, min(total, size))


def test_an_image_stays_with_its_label():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    batches = Batches(one_image_set(images), Data("digits"))
    for pixels, labels in [*batches.training(8, seeded(0)), *batches.evaluation("test", 7)]:
        assert pixels.flatten().tolist() == labels.tolist()


def test_the_same_seed_gives_the_same_batches():
    data = Data("digits", crop_padding=2, flip=True)
    batches = Batches(load_data(data), data)
    first, same, other = (list(batches.training(64, seeded(seed))) for seed in (0, 0, 1))
    assert_equal(first, same)
    assert not torch.equal(first[0][1], other[0][1])


def test_an_incomplete_last_batch_is_left_out_unless_it_is_the_only_one():
    batches = Batches(one_image_set(np.zeros((21, 1, 1, 1), np.uint8)), Data("digits"))
    assert batches.count(8) == len(list(batches.training(8, seeded(0)))) == 2
    ((_, labels),) = batches.training(32, seeded(0))
    assert len(labels) == 21


def test_evaluation_has_every_image_in_order():
    batches = Batches(one_image_set(np.zeros((21, 1, 1, 1), np.uint8)), Data("digits"))
    labels = [labels for _, labels in batches.evaluation("validation", 8)]
    assert [len(batch) for batch in labels] == [8, 8, 5]
    assert torch.cat(labels).tolist() == list(range(21))


def test_workers_evaluate_the_batches_in_turn():
    batches = Batches(one_image_set(np.zeros((21, 1, 1, 1), np.uint8)), Data("digits"))
    shares = [list(batches.evaluation("test", 8, rank, 5)) for rank in range(5)]
    assert [[labels.tolist() for _, labels in share] for share in shares] == [
        [list(range(8))],
        [list(range(8, 16))],
        [list(range(16, 21))],
        [],
        [],
    ]


def test_images_are_normalised_by_the_training_split_with_channels_innermost(image_folder):
    data = Data("folder", str(image_folder({"a": 30, "b": 30})), crop_padding=1, flip=True)
    batches = Batches(load_data(data), data)
    images = torch.cat([images for images, _ in batches.evaluation("train")])
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-4)
    assert images.std((0, 2, 3)).tolist() == pytest.approx([1] * 3, abs=1e-3)
    for images, _ in [*batches.training(8, seeded(0)), *batches.evaluation("test")]:
        assert images.dtype == torch.float32
        assert images.shape[1:] == (3, 8, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_pixels_are_read_where_they_lie():
    data = Data("digits")
    dataset = load_data(data)
    for name in ("train", "validation", "test"):
        for array in vars(getattr(dataset, name)).values():
            array.flags.writeable = False  # As Ray's object store lends them.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = Batches(dataset, data)
    assert batches._images["train"].data_ptr() == dataset.train.images.ctypes.data
    before = dataset.train.images.copy()
    list(batches.training(64, seeded(0)))
    assert np.array_equal(dataset.train.images, before)


@given(
    count=st.integers(1, 4),
    size=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    padding=st.integers(0, 5),
    data=st.data(),
)
def test_a_crop_is_torchvisions_at_the_same_offsets(
    transforms, count, size, channels, padding, data
):
    offsets = st.lists(st.integers(0, 2 * padding), min_size=count, max_size=count)
    down, right = data.draw(offsets), data.draw(offsets)
    images = torch.randint(1, 256, (count, size, size, channels), generator=seeded(0))
    images = images.to(torch.uint8)
    ours = crop(images, padding, torch.tensor(down), torch.tensor(right))
    assert ours.shape == images.shape
    for image, here, top, left in zip(images, ours, down, right, strict=True):
        padded = transforms.functional.pad(image.permute(2, 0, 1), [padding])
        theirs = transforms.functional.crop(padded, top, left, size, size)
        assert torch.equal(here.permute(2, 0, 1), theirs)


@given(flipped=st.lists(st.booleans(), min_size=1, max_size=6), size=st.integers(1, 5))
def test_a_flip_is_torchvisions(transforms, flipped, size):
    images = torch.randint(256, (len(flipped), size, size, 3), generator=seeded(0))
    ours = flip(images, torch.tensor(flipped))
    for image, here, turned in zip(images, ours, flipped, strict=True):
        theirs = image.permute(2, 0, 1)
        theirs = transforms.functional.hflip(theirs) if turned else theirs
        assert torch.equal(here.permute(2, 0, 1), theirs)


def chi_square(outcomes, kinds):
    """Pearson's statistic of these outcomes against all kinds being as frequent."""
    _, counts = np.unique(np.array(outcomes), axis=0, return_counts=True)
    expected = len(outcomes) / kinds
    assert len(counts) == kinds
    return ((counts - expected) ** 2 / expected).sum()


def test_augmentation_is_distributed_as_torchvisions(transforms):
    # Every crop and flip of an image without equal pixels is another picture: 2 * 3 * 3 of them.
    image = np.arange(1, 26, dtype=np.uint8).reshape(1, 5, 5, 1)
    draws, kinds = 6000, 18
    data = Data("digits", crop_padding=1, flip=True)
    ((ours, _),) = Batches(one_image_set(np.repeat(image, draws, 0)), data).training(
        draws, seeded(0)
    )
    compose = transforms.Compose([transforms.RandomCrop(5, 1), transforms.RandomHorizontalFlip()])
    picture = torch.tensor(image[0, :, :, 0])[None].float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [compose(picture).flatten().numpy() for _ in range(draws)]
    ours = ours.flatten(1).numpy()
    assert {row.tobytes() for row in ours} == {row.tobytes() for row in theirs}
    bound = 40.8  # Exceeded by chance once in 1,000 times, with 17 degrees of freedom.
    assert chi_square(ours, kinds) < bound
    assert chi_square(theirs, kinds) < bound


def test_without_augmentation_images_are_as_they_were():
    images = np.arange(8 * 4 * 4 * 3, dtype=np.uint8).reshape(8, 4, 4, 3)
    ((ours, labels),) = Batches(one_image_set(images), Data("digits")).training(8, seeded(0))
    assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), images[labels.numpy()])


@pytest.fixture
def both(image_folder):
    """The same folder as batches from memory and from a stream."""

    def make(**fields):
        path = image_folder({"train/a": 25, "train/b": 20, "test/a": 6, "test/b": 9}, (10, 10))
        fields = {"image_size": 8, "crop_padding": 2, "flip": True, **fields}
        found = []
        for loading in ("memory", "stream"):
            data = Data("folder", str(path), loading=loading, **fields)
            found.append(Batches(load_data(data), data))
        return found

    return make


@pytest.mark.parametrize("limit", [None, 20])
def test_a_stream_gives_the_batches_of_memory_bit_by_bit(both, limit):
    memory, stream = both(limit=limit)
    for epoch in range(2):
        assert_equal(memory.training(8, seeded(epoch)), stream.training(8, seeded(epoch)))
        for rank in range(2):
            ours, theirs = (b.training(8, seeded(epoch), rank, 2) for b in (memory, stream))
            assert_equal(ours, theirs)
        for split in ("train", "validation", "test"):
            for worker in ((0, 1), (0, 2), (1, 2), (99, 100)):
                ours, theirs = (b.evaluation(split, 7, *worker) for b in (memory, stream))
                assert_equal(ours, theirs)


def test_a_stream_is_evaluated_in_the_middle_of_an_epoch_and_of_another(both):
    memory, stream = both()
    ours, theirs = memory.training(8, seeded(0)), stream.training(8, seeded(0))
    assert_equal([next(ours)], [next(theirs)])
    inner, other = memory.training(4, seeded(1)), stream.training(4, seeded(1))
    assert_equal([next(inner)], [next(other)])
    assert_equal(memory.evaluation("test", 4), stream.evaluation("test", 4))
    assert_equal(inner, other)
    assert_equal(ours, theirs)
    # An epoch that is left before its end does not disturb the next one.
    next(stream.training(8, seeded(2)))
    assert_equal(memory.training(8, seeded(3)), stream.training(8, seeded(3)))


def test_a_stream_leaves_torchs_generator_alone(both):
    _, stream = both()
    before = torch.get_rng_state()
    list(stream.training(8, seeded(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_processes_of_a_stream_stay_for_the_next_epoch_and_end_with_it(both):
    _, stream = both(loader_workers=2)
    before = set(multiprocessing.active_children())
    seen = []
    for epoch in range(3):
        list(stream.training(8, seeded(epoch)))
        list(stream.evaluation("test"))
        seen.append({child.pid for child in set(multiprocessing.active_children()) - before})
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]
    del stream
    gc.collect()
    deadline = time.monotonic() + 20
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(multiprocessing.active_children()) - before


def test_a_broken_file_in_a_stream_is_named(both):
    _, stream = both()
    broken = stream.dataset.test._path(3)
    broken.write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(InputError, match=rf"data\.path.*{broken.name}.*not a readable image"):
            list(stream.evaluation("test", 2))


def test_files_of_other_sizes_in_a_stream_are_named(image_folder):
    from PIL import Image

    path = image_folder({"a": 20, "b": 20})
    data = Data("folder", str(path), loading="stream")
    dataset = load_data(data)
    Image.new("RGB", (9, 9)).save(dataset.train._path(0))
    with pytest.raises(InputError, match=r"data\.image_size: None .* images differ in size"):
        list(Batches(dataset, data).evaluation("train"))


@pytest.fixture
def recipe(image_folder):
    """A folder as on ImageNet, and batches of it, decoded by so many processes."""
    path = image_folder({"train/a": 25, "train/b": 20, "val/a": 6, "val/b": 9}, (20, 16))
    data = Data("folder", str(path), image_size=8, random_resized_crop=True, flip=True)
    return lambda workers=2: Batches(
        load_data(data), dataclasses.replace(data, loader_workers=workers)
    )


def test_random_parts_depend_on_the_seed_alone(recipe):
    first, same, other = recipe(), recipe(1), recipe()
    for epoch in range(2):
        assert_equal(first.training(8, seeded(epoch)), same.training(8, seeded(epoch)))
    (ours, _), (theirs, _) = next(first.training(8, seeded(0))), next(other.training(8, seeded(1)))
    assert not torch.equal(ours, theirs)


def test_workers_share_each_batch_of_random_parts(recipe):
    whole, parts = recipe(), [recipe().training(8, seeded(0), rank, 2) for rank in (0, 1)]
    for (images, labels), *shares in zip(whole.training(8, seeded(0)), *parts, strict=True):
        for rank, (share, truth) in enumerate(shares):
            assert torch.equal(share, images[rank::2])
            assert torch.equal(truth, labels[rank::2])


def test_random_parts_are_of_the_image_whose_label_they_have(recipe):
    from PIL import Image

    batches = recipe()
    for place, path in enumerate(batches.dataset.train.paths):
        shade = 5 * place + 1
        file = f"{batches.dataset.train.root}/{path.decode()}"
        Image.new("RGB", (20, 16), (shade, shade, shade)).save(file)
    labels = torch.from_numpy(batches.dataset.train.labels)
    for images, truth in batches.training(8, seeded(0)):
        mean, deviation = batches.dataset.mean[0], batches.dataset.deviation[0]
        shades = (images[:, 0] * deviation + mean).round().flatten(1)
        assert (shades == shades[:, :1]).all()
        places = ((shades[:, 0] - 1) / 5).long()
        assert torch.equal(labels[places], truth)


def test_evaluation_has_no_random_parts(recipe):
    batches = recipe()
    for split in ("train", "validation", "test"):
        assert_equal(batches.evaluation(split), batches.evaluation(split))
    files = batches.dataset.test
    ((images, _),) = batches.evaluation("test")
    deviation, mean = (
        torch.tensor(v).view(3, 1, 1) for v in (batches.dataset.deviation, batches.dataset.mean)
    )
    pixels = torch.from_numpy(files.pixels(np.arange(len(files)))).permute(0, 3, 1, 2)
    assert torch.equal((images * deviation + mean).round(), pixels.float())


def test_importing_is_cheap():
    script = "import sys, raytickets.batches; print([n for n in %r if n in sys.modules])"
    heavy = ["torch._dynamo", "torchvision", "sklearn", "ray", "mlflow"]
    command = [sys.executable, "-c", script % heavy]
    assert subprocess.check_output(command, text=True, timeout=120).strip() == "[]"
