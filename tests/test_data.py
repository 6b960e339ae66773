"""Images are read once, split without overlap, and batched as torchvision would."""

import numpy as np
import pytest
import torch

from raytickets.config import Data, InputError
from raytickets.data import Batches, DataSet, Images, Shape, crop, load_data
from raytickets.train import seeded


@pytest.fixture(scope="module")
def digits():
    return load_data(Data("digits", validation=0.1, test=0.25))


def rows(split):
    return {image.tobytes() for image in split.images}


def test_digits_are_split_into_disjoint_stratified_parts(digits):
    splits = [digits.train, digits.validation, digits.test]
    assert [len(split) for split in splits] == [1168, 179, 450]
    assert not rows(splits[0]) & rows(splits[1]) | rows(splits[0]) & rows(splits[2])
    assert not rows(splits[1]) & rows(splits[2])
    for split in splits:
        shares = np.bincount(split.labels, minlength=10) / len(split)
        assert shares == pytest.approx([0.1] * 10, abs=0.02)


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    splits = [digits.train, digits.validation, digits.test]
    ours = sorted((i * (16 / 255)).round().tobytes() for s in splits for i in s.images)
    assert ours == sorted(image.tobytes() for image in load_digits().images)


def test_the_fingerprint_is_of_the_split_data(digits):
    same = load_data(Data("digits", validation=0.1, test=0.25))
    other = load_data(Data("digits", validation=0.1, test=0.25, split_seed=1))
    assert digits.fingerprint == same.fingerprint != other.fingerprint


def test_a_folder_with_train_and_test_has_validation_carved_from_train(image_folder):
    path = image_folder({"train/a": 10, "train/b": 20, "test/a": 3, "test/b": 4})
    found = load_data(Data("folder", str(path), validation=0.2))
    assert [len(found.train), len(found.validation), len(found.test)] == [24, 6, 7]
    assert found.shape.classes == ("a", "b")
    assert found.train.images.shape[1:] == (3, 8, 8)
    assert not rows(found.train) & rows(found.validation)


def test_a_plain_folder_is_split_three_ways(image_folder):
    path = image_folder({"a": 20, "b": 20})
    found = load_data(Data("folder", str(path), validation=0.1, test=0.2))
    assert [len(found.train), len(found.validation), len(found.test)] == [28, 4, 8]


def test_images_are_resized_when_asked(image_folder):
    path = image_folder({"a": 10, "b": 10}, size=(12, 20))
    assert load_data(Data("folder", str(path), image_size=6)).shape.size == 6
    with pytest.raises(InputError, match=r"data\.image_size.*not square"):
        load_data(Data("folder", str(path)))


def test_a_limit_takes_fewer_images_of_every_split(image_folder):
    path = image_folder({"train/a": 30, "train/b": 30, "test/a": 20, "test/b": 20})
    found = load_data(Data("folder", str(path), limit=10))
    assert [len(found.train), len(found.validation), len(found.test)] == [10, 5, 5]


def test_a_broken_image_is_named(image_folder):
    path = image_folder({"a": 4, "b": 4})
    (path / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b/1\.png.*not a readable image"):
        load_data(Data("folder", str(path)))


def one_image_set(images):
    labels = np.arange(len(images))
    split = Images(images, labels.astype(np.int64))
    return DataSet(split, split, split, Shape(*images.shape[1:3], tuple(map(str, labels))), "")


def test_an_epoch_has_every_image_once_and_workers_share_each_batch():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    batches = Batches(one_image_set(images), Data("digits"))
    whole = [labels for _, labels in batches.training(8, seeded(0))]
    assert sorted(torch.cat(whole).tolist()) == list(range(40))
    halves = [[labels for _, labels in batches.training(8, seeded(0), r, 2)] for r in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert [len(part) for part in parts] == [4, 4]
        assert sorted(torch.cat(parts).tolist()) == sorted(batch.tolist())


def test_an_incomplete_last_batch_is_left_out():
    batches = Batches(one_image_set(np.zeros((21, 1, 1, 1), np.uint8)), Data("digits"))
    assert batches.count(8) == len(list(batches.training(8, seeded(0)))) == 2


def test_images_are_normalised_by_the_training_split(digits):
    batches = Batches(digits, Data("digits"))
    images = torch.cat([images for images, _ in batches.evaluation("train")])
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_a_crop_is_a_window_of_the_padded_image():
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4) + 1
    out = crop(images, 2, torch.tensor([2, 0]), torch.tensor([2, 3]))
    assert torch.equal(out[0], images[0])
    expected = torch.nn.functional.pad(images[1], (2, 2, 2, 2))[:, 0:4, 3:7]
    assert torch.equal(out[1], expected)


def test_augmentation_shifts_every_way_and_flips_half():
    image = np.zeros((1, 1, 3, 3), np.uint8)
    image[0, 0, 1, 0] = 255
    data = Data("digits", crop_padding=1, flip=True)
    batches = Batches(one_image_set(np.repeat(image, 4000, 0)), data)
    ((images, _),) = batches.training(4000, seeded(0))
    # The dot at column 0 lands in columns 0 and 1 or is pushed out; flipped, in 2 and 1.
    where = (images.squeeze(1) > images.min() + 1e-3).float().mean(0)
    assert where.sum().item() == pytest.approx(2 / 3, abs=0.03)
    columns = where.sum(0).tolist()
    assert columns == pytest.approx([1 / 6, 1 / 3, 1 / 6], abs=0.03)
    assert where.sum(1).tolist() == pytest.approx([2 / 9] * 3, abs=0.03)
