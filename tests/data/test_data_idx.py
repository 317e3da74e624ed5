"""The idx reader takes whole files of the right kind only."""

import functools
import gzip
import struct

import numpy as np
import pytest

from wsbcn_flax.data import IdxFormatError
from wsbcn_flax.data._idx import read_idx, read_idx_pair

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
HEADER = struct.pack(">IIII", 0x00000803, 2, 3, 4)


# Without the time: it would be in the names of tests, on which all workers must agree.
gzipped = functools.partial(gzip.compress, mtime=0)


@pytest.fixture
def idx_file(tmp_path):
    def write(content: bytes, name: str = "images.gz"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def test_reads_the_published_layout(idx_file):
    path = idx_file(gzipped(HEADER + bytes(range(24))))
    np.testing.assert_array_equal(read_idx(path, ndim=3), IMAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08\x03 no gzip", "not a whole gzip file"),
        (gzipped(HEADER + bytes(24))[:-9], "not a whole gzip file"),
        (gzipped(b""), "00000803, got nothing"),
        (gzipped(struct.pack(">II", 0x801, 24) + bytes(24)), "00000803, got 00000801.*mixed"),
        (gzipped(struct.pack(">IIII", 0xD03, 2, 3, 4)), "got 00000d03"),
        (gzipped(HEADER[:10]), "inside the header, after 10 bytes"),
        (gzipped(HEADER + bytes(23)), "says 2 x 3 x 4 bytes, the file holds 23"),
        (gzipped(HEADER + bytes(25)), "the file holds 25"),
        (gzipped(struct.pack(">IIII", 0x803, *[2**32 - 1] * 3)), "the file holds 0"),
    ],
)
def test_rejects(idx_file, content, message):
    path = idx_file(content)
    with pytest.raises(IdxFormatError, match=message) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)


def test_rejects_a_flipped_bit(idx_file):
    content = bytearray(gzipped(HEADER + bytes(range(24))))
    content[len(content) // 2] ^= 1
    with pytest.raises(IdxFormatError):
        read_idx(idx_file(bytes(content)), ndim=3)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gz"):
        read_idx(tmp_path / "absent.gz", ndim=3)


@pytest.mark.parametrize(("images", "labels"), [(2, 3), (0, 0)])
def test_pair_rejects_counts(idx_file, images, labels):
    images_path = idx_file(gzipped(struct.pack(">IIII", 0x803, images, 3, 4) + bytes(12 * images)))
    labels_path = idx_file(gzipped(struct.pack(">II", 0x801, labels) + bytes(labels)), "labels.gz")
    with pytest.raises(IdxFormatError, match=rf"got {images} images .* and {labels} labels"):
        read_idx_pair(images_path, labels_path)
