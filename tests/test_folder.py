"""An ImageFolder is listed by class and name, and decoded once."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from raytickets import folder as folder_module
from raytickets.config import InputError
from raytickets.folder import Files, list_folder, random_part, read_images
from raytickets.vision import torchvision

WARNING = "decoded images are not cached"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache's folder, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAYTICKETS_CACHE", raising=False)
    folder_module._warn.cache_clear()
    return tmp_path / "cache" / "raytickets"


@pytest.fixture
def decoded(monkeypatch):
    """How many files every `read_images` decoded since the last look."""
    paths = []
    original = folder_module.open_image
    monkeypatch.setattr(
        folder_module, "open_image", lambda path: paths.append(path) or original(path)
    )

    def count():
        seen = len(paths)
        paths.clear()
        return seen

    return count


def files_of(path, size=None) -> Files:
    return list_folder(str(path)).files(size or 8, resize=size is not None)


def test_files_are_sorted_by_class_and_name(image_folder):
    path = image_folder({"b": 2, "b/deeper": 1, "a": 11})
    (path / "a" / "notes.txt").write_text("no image")
    (path / "a" / "5.png").rename(path / "a" / "upper.PNG")
    found = list_folder(str(path))
    names = ["0", "1", "10", "2", "3", "4", "6", "7", "8", "9"]
    of_a = [f"a/{name}.png" for name in names] + ["a/upper.PNG"]
    assert found.paths == (*of_a, "b/0.png", "b/1.png", "b/deeper/0.png")
    assert found.labels.tolist() == [0] * 11 + [1] * 3
    assert found.classes == ("a", "b")


def test_splits_that_are_there_are_told_apart(image_folder):
    path = image_folder({"train/a": 3, "train/b": 2, "test/a": 1, "test/b": 1})
    found = list_folder(str(path))
    assert {name: len(places) for name, places in found.splits.items()} == {"train": 5, "test": 2}
    assert [found.paths[place] for place in found.splits["test"]] == [
        "test/a/0.png",
        "test/b/0.png",
    ]


def test_a_folder_that_cannot_be_read_is_named_and_not_left_out(image_folder, monkeypatch):
    path = image_folder({"train/a": 3, "train/b": 1, "train/b/more": 2})
    scandir = os.scandir

    def refusing(place):
        if Path(place).name == "more":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"^data\.path: .*/b/more' .* cannot be read \(Permission"):
        list_folder(str(path))


def test_a_home_folder_that_nobody_knows_is_refused():
    with pytest.raises(InputError, match=r"^data\.path: '~nobody-here/x' .* must be a folder"):
        list_folder("~nobody-here/x")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_is_the_test_split_where_there_is_no_other(image_folder, name):
    path = image_folder({"train/a": 3, "train/b": 2, f"{name}/a": 1, f"{name}/b": 1})
    found = list_folder(str(path))
    assert {name: len(places) for name, places in found.splits.items()} == {"train": 5, "test": 2}
    image_folder({"test/a": 2, "test/b": 2})
    found = list_folder(str(path))
    sizes = {name: len(places) for name, places in found.splits.items()}
    assert sizes == {"train": 5, "validation": 2, "test": 4}


def test_two_validation_folders_are_refused(image_folder):
    names = ("train", "val", "validation")
    path = image_folder({f"{name}/{label}": 1 for name in names for label in "ab"})
    with pytest.raises(InputError, match=r"data\.path: .* one of validation and val, not both"):
        list_folder(str(path))


@pytest.mark.parametrize("names", [("Training", "Testing"), ("seg_train", "seg_test")])
def test_splits_by_other_names_are_no_classes(image_folder, names):
    path = image_folder({f"{name}/{label}": 1 for name in names for label in "ab"})
    with pytest.raises(InputError, match=f"{names[0]} and {names[1]}, .* called train and test"):
        list_folder(str(path))


def test_a_class_may_be_called_as_a_split_is(image_folder):
    path = image_folder({"Train": 1, "bus": 1, "test_tube": 1, "train_station": 1})
    (path / "test").write_text("no folder")
    assert list_folder(str(path)).classes == ("Train", "bus", "test_tube", "train_station")


SIZES = [(40, 30), (30, 40), (31, 31), (200, 9), (9, 200)]


@pytest.mark.parametrize("size", SIZES)
def test_images_that_are_not_trained_on_are_resized_and_cropped_as_on_imagenet(image_folder, size):
    from PIL import Image

    transforms = torchvision("transforms")
    path = image_folder({"a": 1, "b": 1}, size)
    files = list_folder(str(path)).files(14, True, True)
    expected = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(14)])
    (ours,) = files.pixels(np.array([0]))
    assert np.array_equal(ours, np.asarray(expected(Image.open(path / "a" / "0.png"))))


@pytest.mark.parametrize("size", SIZES)
def test_images_to_train_on_are_random_parts_cut_and_resized_as_torchvision_does(
    image_folder, size
):
    from PIL import Image

    transforms = torchvision("transforms")
    path = image_folder({"a": 1, "b": 1}, size)
    files = list_folder(str(path)).files(14, True, True)
    image = Image.open(path / "a" / "0.png")
    pictures = files.pixels(np.zeros(20, np.int64), seeds=np.arange(20))
    for seed, ours in enumerate(pictures):
        left, top, right, bottom = random_part(*size, np.random.default_rng(seed))
        theirs = transforms.functional.resized_crop(
            image, top, left, bottom - top, right - left, [14, 14]
        )
        assert np.array_equal(ours, np.asarray(theirs))
    again = files.pixels(np.zeros(20, np.int64), threads=1, seeds=np.arange(20))
    assert np.array_equal(pictures, again)


@pytest.mark.parametrize("size", SIZES)
def test_random_parts_are_distributed_as_torchvisions(size):
    import torch
    from scipy.stats import ks_2samp

    width, height = size
    crop = torchvision("transforms").RandomResizedCrop
    blank, draws = torch.zeros(3, height, width), 1000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [crop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)]
    generator = np.random.default_rng(0)
    ours = [random_part(width, height, generator) for _ in range(draws)]
    ours = [(top, left, bottom - top, right - left) for left, top, right, bottom in ours]
    for one, other in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        assert ks_2samp(one, other).pvalue > 0.001
    areas = [[high * wide for *_, high, wide in parts] for parts in (ours, theirs)]
    assert ks_2samp(*areas).pvalue > 0.001


def test_pixels_are_pillows(image_folder):
    path = image_folder({"a": 2, "b": 1}, size=(12, 9))
    images = [Image.open(path / name) for name in ("a/0.png", "a/1.png", "b/0.png")]
    files = files_of(path, size=6)
    expected = [ImageOps.fit(image, (6, 6), Image.Resampling.BILINEAR) for image in images]
    pixels = files.pixels(np.array([2, 0, 1]))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.stack(expected)[[2, 0, 1]])


def test_sixteen_bits_of_grey_become_eight(image_folder):
    path = image_folder({"a": 2, "b": 1})
    grey = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(path / "a" / "0.png")
    pixels = read_images(files_of(path))[0]
    assert np.array_equal(pixels, np.repeat(grey[:, :, None] // 256, 3, 2))


def test_pixels_without_a_known_range_are_refused(image_folder):
    path = image_folder({"a": 2, "b": 1})
    Image.fromarray(np.zeros((8, 8), np.float32)).save(path / "a" / "0.tiff")
    with pytest.raises(InputError, match=r"a/0\.tiff.*mode F have no known range"):
        read_images(files_of(path))


@pytest.mark.parametrize(
    "content", [b"no image", b"", b"\x89PNG\r\n", b"\x89PNG\r\n\x1a\n" + bytes(40)]
)
def test_a_broken_image_is_named(image_folder, content):
    path = image_folder({"a": 4, "b": 4})
    (path / "b" / "1.png").write_bytes(content)
    with pytest.raises(InputError, match=r"b/1\.png.*not a readable image"):
        read_images(files_of(path))


def test_a_file_that_leads_nowhere_is_named(image_folder):
    path = image_folder({"a": 4, "b": 4})
    (path / "b" / "9.png").symlink_to("nothing")
    with pytest.raises(InputError, match=r"b/9\.png.*not a readable image"):
        read_images(files_of(path))


def test_a_link_that_leads_back_is_named(image_folder):
    path = image_folder({"a/x": 4, "b": 4})
    (path / "a" / "y").symlink_to(path / "b")
    assert len(files_of(path)) == 12
    (path / "a" / "x" / "again").symlink_to(path / "a")
    with pytest.raises(InputError, match=r"a/x/again.* must not lead back"):
        files_of(path)


def test_images_are_decoded_once(image_folder, cache, decoded):
    path = image_folder({"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2})
    first = read_images(files_of(path))
    assert decoded() == 12
    second = read_images(files_of(path))
    assert decoded() == 0
    assert type(second) is np.ndarray
    assert second.dtype == np.uint8
    assert np.array_equal(first, second)
    (entry,) = cache.iterdir()
    assert np.array_equal(np.load(entry), first)


def test_of_a_part_no_more_is_decoded_and_all_that_was_serves_it(image_folder, cache, decoded):
    files = files_of(image_folder({"a": 6, "b": 6}))
    places = np.array([1, 4, 11])
    part = read_images(files, places)
    assert decoded() == 3
    whole = read_images(files)
    assert decoded() == 12
    assert np.array_equal(part, whole[places])
    assert np.array_equal(part, read_images(files, places))
    other = read_images(files, np.array([0, 2]))
    assert decoded() == 0
    assert np.array_equal(other, whole[[0, 2]])
    assert len(list(cache.iterdir())) == 2


def touch(path):
    stat = (path / "a" / "0.png").stat()
    os.utime(path / "a" / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def grow(path):
    stat = (path / "a" / "0.png").stat()
    with (path / "a" / "0.png").open("ab") as file:
        file.write(b" ")
    os.utime(path / "a" / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        touch,
        grow,
        lambda path: shutil.copy2(path / "a" / "0.png", path / "a" / "new.png"),
        lambda path: (path / "a" / "0.png").unlink(),
        lambda path: (path / "a" / "0.png").rename(path / "a" / "renamed.png"),
        lambda path: (path / "b" / "3.png").rename(path / "a" / "moved.png"),
    ],
    ids=["touched", "grown", "added", "removed", "renamed", "moved to another class"],
)
def test_a_changed_folder_is_decoded_anew_and_its_old_entry_deleted(
    image_folder, cache, decoded, change
):
    path = image_folder({"a": 4, "b": 4})
    read_images(files_of(path))
    (old,) = cache.iterdir()
    decoded()
    change(path)
    images = read_images(files_of(path))
    assert decoded() == len(images)
    (new,) = cache.iterdir()
    assert new != old


def test_sizes_and_folders_are_told_apart(image_folder, cache, decoded, tmp_path):
    path = image_folder({"a": 4, "b": 4})
    read_images(files_of(path, size=6))
    assert read_images(files_of(path, size=7)).shape == (8, 7, 7, 3)
    assert decoded() == 16
    other = shutil.copytree(path, tmp_path / "other")
    read_images(files_of(other, size=7))
    assert decoded() == 8
    assert len(list(cache.iterdir())) == 2
    read_images(files_of(path, size=7))
    assert decoded() == 0


def test_a_folder_by_another_name_is_the_same(image_folder, decoded, tmp_path, monkeypatch):
    path = image_folder({"a": 4, "b": 4})
    read_images(files_of(path))
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    decoded()
    read_images(files_of("link"))
    read_images(files_of("images"))
    assert decoded() == 0


def flip_a_bit(content):
    content[-100] ^= 1


def cut_in_half(content):
    del content[len(content) // 2 :]


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, cut_in_half, bytearray.clear, lambda c: c.append(0), lambda c: c.__delitem__(-1)],
    ids=["a bit", "a half", "empty", "a byte more", "a byte less"],
)
def test_a_damaged_entry_is_decoded_anew_and_written_again(image_folder, cache, decoded, damage):
    path = image_folder({"a": 4, "b": 4})
    first = read_images(files_of(path))
    (entry,) = cache.iterdir()
    content = bytearray(entry.read_bytes())
    damage(content)
    entry.write_bytes(content)
    decoded()
    assert np.array_equal(read_images(files_of(path)), first)
    assert decoded() == 8
    read_images(files_of(path))
    assert decoded() == 0


@pytest.mark.parametrize("off", ["0", "off"])
def test_the_cache_can_be_switched_off(image_folder, cache, decoded, monkeypatch, off):
    monkeypatch.setenv("RAYTICKETS_CACHE", off)
    path = image_folder({"a": 4, "b": 4})
    for _ in range(2):
        read_images(files_of(path))
        assert decoded() == 8
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_one_line(image_folder, cache, caplog):
    cache.parent.write_text("no folder")
    path = image_folder({"a": 4, "b": 4})
    for _ in range(2):
        assert read_images(files_of(path)).shape == (8, 8, 8, 3)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert WARNING in record.message
    assert "\n" not in record.message


def test_a_full_disk_costs_one_line_and_leaves_nothing(image_folder, cache, caplog, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = image_folder({"a": 4, "b": 4})
    assert read_images(files_of(path)).shape == (8, 8, 8, 3)
    assert "No space left" in caplog.text
    assert list(cache.iterdir()) == []


def test_what_killed_writers_left_is_deleted_after_a_day(image_folder, cache):
    path = image_folder({"a": 4, "b": 4})
    read_images(files_of(path))
    (entry,) = cache.iterdir()
    young, old = (cache / f"{entry.stem}{name}.tmp" for name in ("young", "old"))
    for left in (young, old):
        left.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    touch(path)
    read_images(files_of(path))
    assert young.exists()
    assert not old.exists()


def test_processes_that_write_at_once_agree(image_folder, cache):
    path = image_folder({"a": 40, "b": 40})
    script = (
        "import sys; from raytickets.folder import *\n"
        "sys.stdin.readline()\n"
        "files = list_folder(sys.argv[1]).files(8, False)\n"
        "print(hashlib.sha256(read_images(files)).hexdigest())\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60) for process in started]
    assert len({output for output, _ in told}) == 1
    assert [errors for _, errors in told] == [""] * 2
    (entry,) = cache.iterdir()
    assert entry.suffix == ".npy"
