"""idx files and CIFAR's archives are read as published; any other file is refused."""

import functools
import gzip
import itertools
import pickle
import re
import struct

import numpy as np
import pytest
from source_files import CIFAR, CLASSES, pickle_dict, write_archive, write_cifar, write_idx

from wsbcn_flax.data import DatasetFormatError, _load
from wsbcn_flax.data._readers import read_fashion, read_idx

HEADER = struct.pack(">IIII", 0x00000803, 2, 3, 4)
# mtime=0 keeps the time out of the names of tests, on which all workers must agree.
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
        (gzipped(HEADER[:10]), "hold 16 . .* bytes, received 10"),
        (gzipped(HEADER + bytes(23)), r"hold 16 \+ 2x3x4 bytes, received 39"),
        (gzipped(HEADER + bytes(25)), "bytes, received 41"),
        (gzipped(struct.pack(">IIII", 0x803, *[2**32 - 1] * 3)), "bytes, received 16"),
    ],
)
def test_rejects_other_files(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DatasetFormatError, match=f"^{re.escape(str(path))} must .*{message}"):
        read_idx(path, ndim=3)


@pytest.mark.parametrize("read", [lambda p: read_idx(p, ndim=3), lambda p: _read(p.parent)])
def test_missing_file(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"\.gz"):
        read(tmp_path / "absent.gz")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            (30, 28, 28),
            [9] * 29,
            r"the train files of .* images \[30, 28, 28\] and 29 labels",
        ),
        ((0, 28, 28), [], r"received images \[0, 28, 28\] and 0 labels"),
        ((2, 27, 27), [0, 1], r"images of 28x28 .* received images \[2, 27, 27\]"),
        ((2, 28, 28), [0, 10], "labels below 10, .* labels up to 10"),
    ],
)
def test_rejects_other_datasets(tmp_path, images, labels, message):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros(images))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array(labels))
    with pytest.raises(DatasetFormatError, match=message):
        read_fashion(tmp_path)


def _read(folder, name="cifar10"):
    return _load.DATASETS[name].read(folder, "train")


@pytest.mark.parametrize("name", CIFAR)
def test_reads_every_image_of_every_member_in_order(tmp_path, monkeypatch, name):
    written = write_cifar(tmp_path, name, monkeypatch)
    splits, class_names = _read(tmp_path, name)
    assert splits.keys() == written.keys() == {"train", "test"}
    for split, (images, labels) in written.items():
        assert splits[split][0].dtype == np.uint8
        np.testing.assert_array_equal(splits[split][0], images)
        np.testing.assert_array_equal(splits[split][1], labels)
    assert class_names == tuple(f"class_{n}" for n in range(CLASSES[name]))
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR[name][0]], "nothing is extracted"


def test_the_archives_of_these_tests_hold_what_python_2_wrote():
    content = pickle_dict({b"labels": [6, 9], b"data": np.full((2, 3), 255, np.uint8)})
    loaded = pickle.loads(content, encoding="bytes")
    assert loaded[b"labels"] == [6, 9]
    np.testing.assert_array_equal(loaded[b"data"], np.full((2, 3), 255))


@pytest.mark.parametrize(
    ("name", "md5"),
    [
        ("cifar10", "c58f30108f718f92721af3b95e74349a"),
        ("cifar100", "eb9058c3a382ffc7106e4002c42a8d85"),
    ],
)
def test_the_published_checksums(tmp_path, name, md5):
    (tmp_path / CIFAR[name][0]).touch()
    with pytest.raises(DatasetFormatError, match=f"MD5 {md5}, received d41d8cd98f00b204e9800998"):
        _read(tmp_path, name)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_archive_is_not_read(tmp_path, monkeypatch, damage):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / CIFAR["cifar10"][0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= damage == "flipped"
    path.write_bytes(content[: {"cut": -1, "flipped": None, "empty": 0}[damage]])
    with pytest.raises(DatasetFormatError, match=r"with MD5 .*; it is damaged .*: fetch it again"):
        _read(tmp_path)


class Code:
    def __reduce__(self):
        return print, ("a pickle ran code",)


def test_another_archive_runs_no_code(tmp_path, capsys, monkeypatch):
    archive, members, (meta, *_) = CIFAR["cifar10"]
    path, names = tmp_path / archive, [meta, *itertools.chain(*members.values())]
    write_archive(path, {name: pickle.dumps(Code()) for name in names})
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(DatasetFormatError, match=re.escape(str(path))):
        _read(tmp_path)
    assert capsys.readouterr().out == ""
