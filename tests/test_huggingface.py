"""Data sets of Hugging Face are read from disk, their columns and splits found or asked for."""

import dataclasses
import io
import sys

import numpy as np
import pytest
from PIL import Image

from raytickets import data as data_module
from raytickets.config import Data, InputError
from raytickets.data import Shape, describe, load_data

datasets = pytest.importorskip("datasets", reason="needs the extra `huggingface`")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def pictures(count, size=(8, 8), seed=0):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


NAMES = datasets.ClassLabel(names=["cat", "dog"])


def table(count, *, seed=0, size=(8, 8), labels=None, kind=NAMES, image="image", label="label"):
    labels = [n % 2 for n in range(count)] if labels is None else labels
    features = datasets.Features({image: datasets.Image(), label: kind})
    return datasets.Dataset.from_dict(
        {image: pictures(count, size, seed), label: labels}, features=features
    )


@pytest.fixture
def saved(tmp_path):
    """`saved(train=table(20), ...)` is the folder of a data set with these splits."""

    def save(**splits):
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    return save


def parts(found):
    return [found.train, found.validation, found.test]


def test_splits_are_those_of_the_data_set_and_validation_is_carved_from_train(saved):
    path = saved(train=table(20), test=table(6, seed=1))
    found = load_data(Data("huggingface", path, validation=0.2))
    assert [np.bincount(split.labels).tolist() for split in parts(found)] == [
        [8, 8],
        [2, 2],
        [3, 3],
    ]
    assert found.shape == Shape(3, 8, ("cat", "dog"))
    assert describe(Data("huggingface", path)) == found.shape
    expected = np.stack([np.asarray(image) for image in pictures(6, seed=1)])
    assert np.array_equal(found.test.images, expected)


def test_parquet_files_and_a_single_saved_table_are_read_too(tmp_path):
    whole = table(20)
    (tmp_path / "parquet").mkdir()
    whole.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    whole.save_to_disk(tmp_path / "single")
    first, second = (
        load_data(Data("huggingface", str(tmp_path / name))) for name in ("parquet", "single")
    )
    assert [len(split) for split in parts(first)] == [14, 2, 4]
    assert first.fingerprint == second.fingerprint


def test_a_given_validation_split_is_the_test_split_where_there_is_no_other(saved):
    path = saved(train=table(20), validation=table(6, seed=1))
    assert [len(split) for split in parts(load_data(Data("huggingface", path)))] == [18, 2, 6]


def test_test_images_whose_labels_are_kept_secret_are_no_test_split(saved):
    secret = table(4, labels=[-1] * 4, seed=2)
    path = saved(train=table(20), validation=table(6, seed=1), test=secret)
    assert [len(split) for split in parts(load_data(Data("huggingface", path)))] == [18, 2, 6]


def test_images_are_resized_when_asked_and_refused_where_they_differ(saved):
    path = saved(train=table(20, size=(12, 20)))
    with pytest.raises(InputError, match=r"^data\.image_size: .* not square \(12x20 pixels\)"):
        load_data(Data("huggingface", path))
    found = load_data(Data("huggingface", path, image_size=6))
    assert found.train.images.shape[1:] == (6, 6, 3)
    mixed = datasets.concatenate_datasets([table(19), table(1, size=(9, 9))])
    mixed.save_to_disk(path + "-mixed")
    with pytest.raises(InputError, match=r"^data\.image_size: None .* differ in size \(row 19\)"):
        load_data(Data("huggingface", path + "-mixed"))


def test_images_that_take_over_half_the_memory_are_refused(saved, monkeypatch):
    data = Data("huggingface", saved(train=table(20)), image_size=5)
    monkeypatch.setattr(data_module, "physical_memory", lambda: 20 * 75 * 2)
    describe(data)
    monkeypatch.setattr(data_module, "physical_memory", lambda: 20 * 75 * 2 - 1)
    with pytest.raises(
        InputError, match=r"^data\.image_size: 5 .* 20 images of 5 pixels .* memory"
    ):
        describe(data)
    many = dataclasses.replace(data, path=saved(train=table(40)))
    monkeypatch.setattr(data_module, "physical_memory", lambda: 20 * 75 * 2)
    with pytest.raises(InputError, match="40 images"):
        describe(many)
    describe(dataclasses.replace(many, limit=10))  # No others are decoded.


def test_columns_are_found_by_what_they_hold(saved):
    path = saved(train=table(20, image="img", label="animal"))
    assert load_data(Data("huggingface", path)).shape.classes == ("cat", "dog")


def test_of_fine_and_coarse_labels_the_fine_ones_are_taken(saved):
    coarse = datasets.ClassLabel(names=["pet", "wild"])
    both = table(20, label="fine_label").add_column("coarse_label", [0, 1] * 10)
    path = saved(train=both.cast_column("coarse_label", coarse))
    assert load_data(Data("huggingface", path)).shape.classes == ("cat", "dog")
    by_hand = Data("huggingface", path, columns=("image", "coarse_label"))
    assert load_data(by_hand).shape.classes == ("pet", "wild")


def test_a_single_class_is_refused(saved):
    labels = datasets.ClassLabel(names=["pet"])
    path = saved(
        train=table(20)
        .remove_columns("label")
        .add_column("label", [0] * 20)
        .cast_column("label", labels)
    )
    with pytest.raises(InputError, match=r"^data\.path: .* at least two classes .* not 1"):
        describe(Data("huggingface", path))


@pytest.mark.parametrize(
    ("kind", "labels", "classes"),
    [
        (datasets.Value("string"), ["b", "a"] * 10, ("a", "b")),
        (datasets.Value("int64"), [9, 10] * 10, ("9", "10")),
    ],
)
def test_labels_may_be_words_or_numbers(saved, kind, labels, classes):
    path = saved(
        train=table(20, kind=kind, labels=labels), test=table(2, kind=kind, labels=labels[:2])
    )
    found = load_data(Data("huggingface", path))
    assert found.shape.classes == classes
    assert [classes[n] for n in found.test.labels] == [str(label) for label in labels[:2]]


def three_columns():
    return table(20, label="a").add_column("b", [0] * 20).cast_column("b", NAMES)


@pytest.mark.parametrize(
    ("splits", "options", "said"),
    [
        ({"other": table(20)}, {}, r"data\.path: .* a split called train, not only other"),
        ({"train": three_columns()}, {}, r"data\.columns: None .* which are of image, a, b"),
        (
            {"train": table(20)},
            {"columns": ("image", "kind")},
            r"data\.columns: .* two of image, label",
        ),
        (
            {"train": table(20)},
            {"columns": ("label", "image")},
            r"data\.columns: .* label must be a column of images",
        ),
        (
            {"train": table(20, labels=[0, -1] * 10)},
            {},
            r"data\.path: .* a class in the column label of every one",
        ),
        (
            {
                "train": table(20, kind=datasets.Value("string"), labels=["a", "b"] * 10),
                "test": table(1, kind=datasets.Value("string"), labels=["c"]),
            },
            {},
            r"data\.path: .* labels that train has not: c",
        ),
        (
            {"train": table(4, kind=datasets.Value("string"), labels=["a", None] * 2)},
            {},
            r"data\.path: .* one label in every row",
        ),
        (
            {"train": table(2, kind=datasets.List(datasets.Value("int64")), labels=[[0], [1, 2]])},
            {},
            r"data\.path: .* one label in every row",
        ),
        (
            {"train": table(20), "test": table(2, kind=datasets.ClassLabel(names=["a", "b"]))},
            {},
            r"data\.path: .* the same classes in every split",
        ),
    ],
)
def test_what_holds_no_labelled_images_is_refused_in_one_line(saved, splits, options, said):
    with pytest.raises(InputError, match=f"^{said}") as error:
        load_data(Data("huggingface", saved(**splits), **options))
    assert "\n" not in str(error.value)


def test_images_stand_as_the_library_itself_shows_them(saved):
    """Cameras store them sideways, and say so."""
    image, exif = pictures(1)[0], Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "png", exif=exif)
    images = [{"bytes": buffer.getvalue(), "path": None}] * 20
    features = datasets.Features({"image": datasets.Image(), "label": NAMES})
    sideways = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features)
    found = load_data(Data("huggingface", saved(train=sideways)))
    shown = np.asarray(sideways[0]["image"].convert("RGB"))
    assert not np.array_equal(shown, np.asarray(image))
    assert all(np.array_equal(pixels, shown) for pixels in found.train.images)


@pytest.mark.parametrize("image", [{"bytes": b"no image", "path": None}, None])
def test_a_broken_image_is_named_by_its_row(saved, image):
    buffer = io.BytesIO()
    pictures(1)[0].save(buffer, "png")
    images = [{"bytes": buffer.getvalue(), "path": None}] * 20
    images[7] = image
    features = datasets.Features({"image": datasets.Image(), "label": NAMES})
    broken = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features=features)
    with pytest.raises(InputError, match=r"^data\.path: .* no readable image in row 7"):
        load_data(Data("huggingface", saved(train=broken)))


def test_a_name_of_the_hub_is_only_fetched_on_request():
    with pytest.raises(
        InputError, match=r"^data\.path: 'someone/cats' .* no folder .*download=True"
    ):
        load_data(Data("huggingface", "someone/cats"))


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch):
    def refuse(path):
        raise ConnectionError(f"no way to {path}\nat all")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"^data\.path: .* ConnectionError: no way to .* at all$"):
        load_data(Data("huggingface", "someone/cats", download=True))


def test_a_folder_that_holds_no_data_set_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^data\.path: .* datasets cannot read it"):
        load_data(Data("huggingface", str(tmp_path / "empty")))


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"^data\.source: 'huggingface' .* its extra huggingface"):
        load_data(Data("huggingface", "anything"))
