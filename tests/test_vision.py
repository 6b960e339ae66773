"""CIFAR is read by torchvision, from files whose checksums are right.

The archives here are made up: a few images in the layout of the real ones, whose checksums take the
place of the real ones in torchvision.
"""

import hashlib
import pickle
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from raytickets.config import Data, InputError
from raytickets.data import Shape, describe, load_data
from raytickets.vision import read_cifar, torchvision

CLASSES = {"cifar10": 10, "cifar100": 100}


@pytest.fixture(params=CLASSES)
def archive(request, tmp_path, monkeypatch):
    """A data set's name, and the folder with an archive of 2 training images in each class and file
    and 1 test image in each class."""
    source, generator = request.param, np.random.default_rng(0)
    kind = getattr(torchvision("datasets"), source.upper())
    count, folder = CLASSES[source], tmp_path / "data" / kind.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name, each):
        labels = sorted(list(range(count)) * each)
        data = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        if source == "cifar10":
            return write(name, {"data": data, "labels": labels})
        return write(
            name, {"data": data, "coarse_labels": [n // 5 for n in labels], "fine_labels": labels}
        )

    train = [batch(name, 2) for name, _ in kind.train_list]
    test = [batch(name, 1) for name, _ in kind.test_list]
    _, checksum = write(kind.meta["filename"], {kind.meta["key"]: [f"c{n}" for n in range(count)]})
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", test)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum})
    return source, tmp_path / "data"


def first_row(folder, batch):
    return pickle.loads(next(folder.rglob(batch)).read_bytes())["data"][0]


def test_validation_is_carved_from_train_and_the_official_test_split_is_the_test_split(archive):
    source, folder = archive
    count = CLASSES[source]
    of_train = {"cifar10": 5, "cifar100": 1}[source] * 2
    found = load_data(Data(source, str(folder), validation=0.5))
    for split, each in ((found.train, of_train / 2), (found.validation, of_train / 2)):
        assert np.bincount(split.labels).tolist() == [each] * count
    assert found.test.labels.tolist() == list(range(count))
    assert found.shape == Shape(3, 32, tuple(f"c{n}" for n in range(count)))
    assert describe(Data(source, str(folder))) == found.shape
    everything = [split.images for split in (found.train, found.validation, found.test)]
    assert (
        len({image.tobytes() for image in np.concatenate(everything)}) == of_train * count + count
    )


def test_pixels_are_bytes_with_the_channels_innermost(archive):
    source, folder = archive
    images, labels, _ = read_cifar(Data(source, str(folder)), train=False)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    row = first_row(folder, {"cifar10": "test_batch", "cifar100": "test"}[source])
    assert np.array_equal(images[0], row.reshape(3, 32, 32).transpose(1, 2, 0))


def test_files_that_are_not_there_are_asked_for(archive, tmp_path):
    source, _ = archive
    with pytest.raises(
        InputError, match=r"^data\.path: .* is not there; .* download=True"
    ) as error:
        load_data(Data(source, str(tmp_path / "elsewhere")))
    assert "\n" not in str(error.value)
    assert "-python.tar.gz unpacked" in str(error.value)
    assert not (tmp_path / "elsewhere").exists()


def test_files_with_other_checksums_are_refused_unread(archive):
    source, folder = archive
    name = {"cifar10": "data_batch_3", "cifar100": "train"}[source]
    next(folder.rglob(name)).write_bytes(b"cos\nsystem\n(S'touch broken'\ntR.")
    with pytest.raises(InputError, match=r"^data\.path: .* is damaged"):
        load_data(Data(source, str(folder)))
    assert not (folder / "broken").exists()


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Where a server on this machine has the files of `tmp_path`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download_fetches_and_unpacks_the_archive(archive, address, tmp_path, monkeypatch):
    source, folder = archive
    kind = getattr(torchvision("datasets"), source.upper())
    packed = tmp_path / kind.filename
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder / kind.base_folder, kind.base_folder)
    monkeypatch.setattr(kind, "url", f"{address}/{packed.name}")
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    fetched = load_data(Data(source, str(tmp_path / "new"), download=True, validation=0.5))
    held = load_data(Data(source, str(folder), validation=0.5))
    assert fetched.fingerprint == held.fingerprint


def test_a_download_that_fails_is_said_in_one_line(archive, address, tmp_path, monkeypatch):
    source, _ = archive
    kind = getattr(torchvision("datasets"), source.upper())
    monkeypatch.setattr(kind, "url", f"{address}/nowhere.tar.gz")
    with pytest.raises(
        InputError, match=r"^data\.download: True .* cannot be fetched .*Error.* 404"
    ):
        load_data(Data(source, str(tmp_path / "new"), download=True))


def test_torchvision_is_imported_without_torch_dynamo_and_leaves_no_stand_in_for_it():
    script = """
import sys
from raytickets.vision import torchvision
print(torchvision("datasets").CIFAR10.__name__)
print("torch._dynamo" in sys.modules, "torch._dynamo.utils" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["CIFAR10", "False", "False"], done.stderr
