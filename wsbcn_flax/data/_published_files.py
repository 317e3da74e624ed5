"""Readers of the files in which Fashion-MNIST and CIFAR are published."""

import gzip
import hashlib
import itertools
import math
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Images, uint8 [N, height, width, channels], and labels, int [N], of each split.
Splits = Mapping[str, tuple[np.ndarray, np.ndarray]]

IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class DatasetFormatError(ValueError):
    """A file is damaged, or is not the published file that it should be."""


def read_idx_folder(folder: Path, *, size: tuple[int, int], classes: int) -> Splits:
    """Reads `IDX_FILES`, which must hold images and labels of this kind."""
    splits = {}
    for split, names in IDX_FILES.items():
        images, labels = (
            read_idx(folder / name, ndim=n) for name, n in zip(names, (3, 1), strict=True)
        )
        found, largest = images.shape[1:], labels.max(initial=0)
        if not 0 < len(images) == len(labels) or found != size or largest >= classes:
            raise DatasetFormatError(
                f"the {split} files of {folder} must hold images of {_by(size)} and as many labels "
                f"below {classes}, received {len(images)} of {_by(found)} and {len(labels)} labels "
                f"up to {largest}"
            )
        splits[split] = (images[..., np.newaxis], labels)
    return splits


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Reads a gzipped idx file of unsigned bytes with ``ndim`` dimensions.

    It holds two zero bytes, the type of the elements (8 for uint8), the number of dimensions, each
    dimension as a big-endian 32-bit integer, and the elements in C order.
    """

    def error(rule: str) -> DatasetFormatError:
        return DatasetFormatError(f"{path} must {rule}; fetch it again")

    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as cause:
        raise error(f"be a whole gzip file ({cause})") from cause
    magic, size = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if content[:4] != magic:
        received = content[:4].hex() or "nothing"
        raise error(f"start with {magic.hex()}, received {received} (are images and labels mixed?)")
    if len(content) < size:
        raise error(f"hold a header of {size} bytes, received {len(content)}")
    shape = tuple(map(int, np.frombuffer(content, ">u4", count=ndim, offset=4)))
    elements = np.frombuffer(content, np.uint8, offset=size)
    if len(elements) != math.prod(shape):
        raise error(f"hold {_by(shape)} bytes after the header, received {len(elements)}")
    return elements.reshape(shape)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class CifarLayout(NamedTuple):
    """The names in one archive of CIFAR: of its file, its members and their entries."""

    archive: str
    splits: Mapping[str, list[str]]
    meta: str
    labels_key: bytes
    names_key: bytes


CIFAR10 = CifarLayout(
    "cifar-10-python.tar.gz",
    {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
    meta="batches.meta",
    labels_key=b"labels",
    names_key=b"label_names",
)
CIFAR100 = CifarLayout(
    "cifar-100-python.tar.gz",
    {"train": ["train"], "test": ["test"]},
    meta="meta",
    labels_key=b"fine_labels",
    names_key=b"fine_label_names",
)
# As https://www.cs.toronto.edu/~kriz/cifar.html gives them.
PUBLISHED_MD5 = {
    CIFAR10.archive: "c58f30108f718f92721af3b95e74349a",
    CIFAR100.archive: "eb9058c3a382ffc7106e4002c42a8d85",
}


def read_cifar_archive(path: Path, layout: CifarLayout) -> tuple[Splits, tuple[str, ...]]:
    """Reads the splits and the names of the classes, extracting nothing.

    A pickle can run code. So the file is unpickled only if it is the published one, byte for byte.
    """
    expected = PUBLISHED_MD5[layout.archive]
    with path.open("rb") as file:
        received = hashlib.file_digest(file, "md5").hexdigest()
    if received != expected:
        raise DatasetFormatError(
            f"{path} must be the published archive with MD5 {expected}, received {received}; it "
            "is damaged or another file: fetch it again"
        )
    contents: dict[str, dict[bytes, Any]] = {}
    with tarfile.open(path) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy 2.4 deprecates what Python 2's numpy wrote.
        for member in archive:
            name, file = Path(member.name).name, archive.extractfile(member)
            if file and name in (layout.meta, *itertools.chain(*layout.splits.values())):
                contents[name] = pickle.load(file, encoding="bytes")
    splits = {}
    for split, names in layout.splits.items():
        images = np.concatenate([contents[name][b"data"] for name in names])
        labels = np.concatenate([contents[name][layout.labels_key] for name in names])
        splits[split] = (images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)
    return splits, tuple(name.decode() for name in contents[layout.meta][layout.names_key])
