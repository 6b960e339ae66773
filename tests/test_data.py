"""Images are split without overlap, and held in memory or left in their files."""

import dataclasses
import pickle

import numpy as np
import pytest

from raytickets import data as data_module
from raytickets.config import Data, InputError
from raytickets.data import Images, Shape, describe, evaluation_batch, load_data
from raytickets.folder import Files


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digits():
    return load_data(Data("digits", validation=0.1, test=0.25))


def parts(found):
    return [found.train, found.validation, found.test]


def rows(split):
    return {image.tobytes() for image in split.pixels(np.arange(len(split)))}


def test_digits_are_split_into_disjoint_stratified_parts(digits):
    splits = parts(digits)
    assert [len(split) for split in splits] == [1168, 179, 450]
    assert not rows(splits[0]) & rows(splits[1]) | rows(splits[0]) & rows(splits[2])
    assert not rows(splits[1]) & rows(splits[2])
    for split in splits:
        shares = np.bincount(split.labels, minlength=10) / len(split)
        assert shares == pytest.approx([0.1] * 10, abs=0.02)


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    ours = sorted((i * (16 / 255)).round().tobytes() for s in parts(digits) for i in s.images)
    assert ours == sorted(image.tobytes() for image in load_digits().images)


def test_the_fingerprint_is_of_the_split_data(digits):
    same = load_data(Data("digits", validation=0.1, test=0.25))
    other = load_data(Data("digits", validation=0.1, test=0.25, split_seed=1))
    assert digits.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_a_folder_with_train_and_test_has_validation_carved_from_train(image_folder, loading):
    path = image_folder({"train/a": 10, "train/b": 20, "test/a": 3, "test/b": 4})
    found = load_data(Data("folder", str(path), validation=0.2, loading=loading))
    assert [len(split) for split in parts(found)] == [24, 6, 7]
    assert [np.bincount(split.labels).tolist() for split in parts(found)] == [
        [8, 16],
        [2, 4],
        [3, 4],
    ]
    assert found.shape == Shape(channels=3, size=8, classes=("a", "b"))
    assert found.train.pixels(np.arange(5)).shape == (5, 8, 8, 3)
    assert not rows(found.train) & rows(found.validation)


def test_a_plain_folder_is_split_three_ways(image_folder):
    path = image_folder({"a": 20, "b": 20})
    found = load_data(Data("folder", str(path), validation=0.1, test=0.2))
    assert [len(split) for split in parts(found)] == [28, 4, 8]


def test_images_are_resized_when_asked(image_folder):
    path = image_folder({"a": 10, "b": 10}, size=(12, 20))
    assert load_data(Data("folder", str(path), image_size=6)).shape.size == 6
    with pytest.raises(InputError, match=r"data\.image_size.*not square"):
        load_data(Data("folder", str(path)))


def test_a_limit_takes_fewer_images_of_every_split(image_folder):
    path = image_folder({"train/a": 30, "train/b": 30, "test/a": 20, "test/b": 20})
    found = load_data(Data("folder", str(path), limit=10))
    assert [len(split) for split in parts(found)] == [10, 5, 5]


def test_a_split_without_images_is_refused_before_any_is_decoded(image_folder):
    path = image_folder({"a": 4, "b": 4})
    (path / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"data\.validation: 0\.01 .* without images"):
        load_data(Data("folder", str(path), validation=0.01))


@pytest.mark.parametrize("limit", [None, 12])
def test_a_stream_has_the_splits_and_statistics_of_memory(image_folder, limit):
    path = image_folder({"train/a": 20, "train/b": 30, "test/a": 8, "test/b": 8}, size=(10, 10))
    memory, stream = (
        load_data(Data("folder", str(path), image_size=7, limit=limit, loading=loading))
        for loading in ("memory", "stream")
    )
    for held, files in zip(parts(memory), parts(stream), strict=True):
        assert isinstance(held, Images)
        assert isinstance(files, Files)
        assert np.array_equal(held.labels, files.labels)
        assert np.array_equal(held.images, files.pixels(np.arange(len(files))))
    assert (memory.mean, memory.deviation) == (stream.mean, stream.deviation)
    assert memory.shape == stream.shape


def test_a_streams_fingerprint_is_of_names_sizes_and_labels_wherever_the_folder_is(
    image_folder, tmp_path
):
    path = image_folder({"a": 20, "b": 20})
    before = load_data(Data("folder", str(path), loading="stream")).fingerprint
    moved = path.rename(tmp_path / "moved")
    assert load_data(Data("folder", str(moved), loading="stream")).fingerprint == before
    with (moved / "a" / "3.png").open("ab") as file:
        file.write(b" ")
    assert load_data(Data("folder", str(moved), loading="stream")).fingerprint != before


@pytest.fixture
def many_pixels(image_folder, monkeypatch):
    """A folder of 1,200 images of one pixel, and a machine with so many times their memory."""
    path = image_folder({"a": 600, "b": 600}, size=(1, 1))

    def make(times, loading):
        memory = int(1200 * 3 * times)
        monkeypatch.setattr(data_module, "physical_memory", lambda: memory)
        return Data("folder", str(path), loading=loading)

    return make


@pytest.mark.parametrize(
    ("limits", "memory"),
    [(["4096"], 4096), (["max"], None), ([str(2**63 - 4096)], None), (["max", "8192"], 8192)],
)
def test_a_containers_memory_is_what_it_may_take(tmp_path, monkeypatch, limits, memory):
    monkeypatch.setattr(data_module, "_LIMITS", ("/no/such/file",))
    machine = data_module.physical_memory()
    for place, limit in enumerate(limits):
        (tmp_path / str(place)).write_text(f"{limit}\n")
    monkeypatch.setattr(data_module, "_LIMITS", [str(path) for path in tmp_path.iterdir()])
    assert data_module.physical_memory() == (memory or machine)


def test_auto_streams_over_a_quarter_of_the_memory(many_pixels):
    assert isinstance(load_data(many_pixels(4, "auto")).train, Images)
    assert isinstance(load_data(many_pixels(3.99, "auto")).train, Files)
    assert isinstance(load_data(many_pixels(3.99, "memory")).train, Images)


def test_a_folder_whose_images_are_cut_at_random_is_streamed(many_pixels):
    data = dataclasses.replace(many_pixels(100, "auto"), image_size=1, random_resized_crop=True)
    found = load_data(data)
    assert all(isinstance(split, Files) for split in parts(found))
    assert found.train.random_resized_crop


def test_images_in_memory_are_refused_over_half_of_it(many_pixels, monkeypatch):
    monkeypatch.setattr(data_module, "EVALUATION_BATCH", 1)
    describe(many_pixels(2, "memory"))
    with pytest.raises(InputError, match=r"data\.loading: 'memory' .*data\.image_size"):
        describe(many_pixels(1.99, "memory"))


@pytest.mark.parametrize(("size", "images"), [(8, 512), (64, 512), (224, 41), (5000, 1)])
def test_of_large_images_fewer_are_looked_at_together(size, images):
    assert evaluation_batch(size) == images


def test_images_of_which_no_batch_fits_in_memory_are_refused(many_pixels):
    with pytest.raises(InputError, match=r"data\.image_size: 1 .* 512 images .* memory"):
        describe(many_pixels(1, "stream"))


def test_mean_and_deviation_are_those_of_the_training_pixels(image_folder):
    path = image_folder({"a": 60, "b": 80})
    found = load_data(Data("folder", str(path)))
    pixels = found.train.pixels(np.arange(len(found.train))).astype(np.float64)
    assert found.mean == pytest.approx(pixels.mean((0, 1, 2)))
    assert found.deviation == pytest.approx(pixels.std((0, 1, 2)))


def test_mean_and_deviation_of_many_images_are_of_a_sample_drawn_by_the_split_seed(monkeypatch):
    whole = load_data(Data("digits"))
    monkeypatch.setattr(data_module, "_STATISTICS_SAMPLE", 100)
    sample, again, other = (load_data(Data("digits", split_seed=seed)) for seed in (0, 0, 1))
    assert sample.mean == again.mean
    assert len({whole.mean, sample.mean, other.mean}) == 3
    assert sample.mean == pytest.approx(whole.mean, rel=0.1)


def test_images_of_one_colour_can_be_normalised(image_folder):
    from PIL import Image

    path = image_folder({"a": 10, "b": 10})
    for file in path.rglob("*.png"):
        Image.new("RGB", (8, 8), (7, 7, 7)).save(file)
    found = load_data(Data("folder", str(path)))
    assert found.mean == (7, 7, 7)
    assert found.deviation == pytest.approx([1e-3] * 3)


@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_another_process_gets_the_data_without_copying_them(image_folder, loading):
    path = image_folder({"a": 20, "b": 20})
    found = load_data(Data("folder", str(path), loading=loading))
    buffers = []
    message = pickle.dumps(found, protocol=5, buffer_callback=buffers.append)
    there = pickle.loads(message, buffers=[buffer.raw() for buffer in buffers])
    array = {"memory": "images", "stream": "paths"}[loading]
    assert np.shares_memory(getattr(there.train, array), getattr(found.train, array))
    assert len(message) < 2000


def test_describing_reads_one_image(image_folder):
    path = image_folder({"a": 4, "b": 4})
    (path / "b" / "1.png").write_bytes(b"no image")
    assert describe(Data("folder", str(path))) == Shape(3, 8, ("a", "b"))
    (path / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a/0\.png.*not a readable image"):
        describe(Data("folder", str(path)))
