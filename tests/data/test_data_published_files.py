"""idx files and CIFAR's archives are read as published; any other file is refused."""

import functools
import gzip
import pickle
import re
import struct

import numpy as np
import pytest
from source_files import CLASSES, pickle_dict, write_archive, write_cifar, write_idx

from wsbcn_flax.data import DatasetFormatError, _published_files
from wsbcn_flax.data._published_files import (
    CIFAR10,
    CIFAR100,
    read_cifar_archive,
    read_idx,
    read_idx_folder,
)

HEADER = struct.pack(">IIII", 0x00000803, 2, 3, 4)
# Without the time: it would be in the names of tests, on which all workers must agree.
gzipped = functools.partial(gzip.compress, mtime=0)
WHOLE = gzipped(HEADER + bytes(range(24)))


def test_reads_the_published_layout(tmp_path):
    (tmp_path / "images.gz").write_bytes(WHOLE)
    images = read_idx(tmp_path / "images.gz", ndim=3)
    np.testing.assert_array_equal(images, np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08\x03 no gzip", "a whole gzip file"),
        (WHOLE[:-9], "a whole gzip file"),
        (WHOLE[:25] + bytes([WHOLE[25] ^ 1]) + WHOLE[26:], ""),
        (gzipped(b""), "00000803, received nothing"),
        (gzipped(struct.pack(">II", 0x801, 24) + bytes(24)), "00000803, received 00000801.*mixed"),
        (gzipped(struct.pack(">IIII", 0xD03, 2, 3, 4)), "received 00000d03"),
        (gzipped(HEADER[:10]), "header of 16 bytes, received 10"),
        (gzipped(HEADER + bytes(23)), "hold 2x3x4 bytes after the header, received 23"),
        (gzipped(HEADER + bytes(25)), "after the header, received 25"),
        (gzipped(struct.pack(">IIII", 0x803, *[2**32 - 1] * 3)), "after the header, received 0"),
    ],
)
def test_rejects_other_files(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DatasetFormatError, match=f"^{re.escape(str(path))} must .*{message}"):
        read_idx(path, ndim=3)


@pytest.mark.parametrize("read", [lambda p: read_idx(p, ndim=3), lambda p: _cifar(p.parent)])
def test_missing_file(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"\.gz"):
        read(tmp_path / "absent.gz")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((30, 28, 28), [9] * 29, "the train files of .* received 30 of 28x28 and 29 labels"),
        ((0, 28, 28), [], "received 0 of 28x28 and 0 labels"),
        ((2, 27, 27), [0, 1], "images of 28x28 .* received 2 of 27x27"),
        ((2, 28, 28), [0, 10], "labels below 10, .* labels up to 10"),
    ],
)
def test_rejects_other_datasets(tmp_path, images, labels, message):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros(images))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array(labels))
    with pytest.raises(DatasetFormatError, match=message):
        read_idx_folder(tmp_path, size=(28, 28), classes=10)


def _cifar(folder, layout=CIFAR10):
    return read_cifar_archive(folder / layout.archive, layout)


@pytest.mark.parametrize("layout", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_reads_every_image_of_every_member_in_order(tmp_path, monkeypatch, layout):
    written = write_cifar(tmp_path, layout, monkeypatch)
    splits, class_names = _cifar(tmp_path, layout)
    assert splits.keys() == written.keys() == {"train", "test"}
    for split, (images, labels) in written.items():
        assert splits[split][0].dtype == np.uint8
        np.testing.assert_array_equal(splits[split][0], images)
        np.testing.assert_array_equal(splits[split][1], labels)
    assert class_names == tuple(f"class_{n}" for n in range(CLASSES[layout.archive]))
    assert [path.name for path in tmp_path.iterdir()] == [layout.archive], "nothing is extracted"


def test_the_archives_of_these_tests_hold_what_python_2_wrote():
    content = pickle_dict({b"labels": [6, 9], b"data": np.full((2, 3), 255, np.uint8)})
    loaded = pickle.loads(content, encoding="bytes")
    assert loaded[b"labels"] == [6, 9]
    np.testing.assert_array_equal(loaded[b"data"], np.full((2, 3), 255))


def test_the_published_checksums():
    assert _published_files.PUBLISHED_MD5 == {
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    }


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_archive_is_not_read(tmp_path, monkeypatch, damage):
    write_cifar(tmp_path, CIFAR10, monkeypatch)
    path = tmp_path / CIFAR10.archive
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= damage == "flipped"
    path.write_bytes(content[: {"cut": -1, "flipped": None, "empty": 0}[damage]])
    with pytest.raises(DatasetFormatError, match=r"with MD5 .*; it is damaged .*: fetch it again"):
        _cifar(tmp_path)


class Code:
    def __reduce__(self):
        return print, ("a pickle ran code",)


def test_another_archive_runs_no_code(tmp_path, capsys, monkeypatch):
    path = tmp_path / CIFAR10.archive
    members = [name for names in CIFAR10.splits.values() for name in names] + [CIFAR10.meta]
    write_archive(path, {name: pickle.dumps(Code()) for name in members})
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(DatasetFormatError, match=re.escape(str(path))):
        _cifar(tmp_path)
    assert capsys.readouterr().out == ""
