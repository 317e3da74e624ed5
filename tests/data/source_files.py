"""Tiny files in the formats in which Fashion-MNIST and CIFAR are published."""

import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

from wsbcn_flax.data import _load

# For each archive: its file; the members of each split; the metadata, and keys of labels and names.
CIFAR = {
    "cifar10": (
        "cifar-10-python.tar.gz",
        {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
        ("batches.meta", b"labels", b"label_names"),
    ),
    "cifar100": (
        "cifar-100-python.tar.gz",
        {"train": ["train"], "test": ["test"]},
        ("meta", b"fine_labels", b"fine_label_names"),
    ),
}
CLASSES = {"cifar10": 10, "cifar100": 100}
Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def write_idx_folder(folder: Path, *, seed: int = 0) -> Splits:
    """Writes the four idx files of a tiny dataset and returns its arrays by split."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, prefix, count in (("train", "train", 30), ("test", "t10k", 20)):
        images = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count) % 10
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
        splits[split] = (images[..., np.newaxis], labels)
    return splits


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def write_cifar(folder: Path, name: str, monkeypatch, *, seed: int = 0) -> Splits:
    """Writes an archive of 7 images per member, and makes its MD5 count as the published one."""
    rng, classes = np.random.default_rng(seed), CLASSES[name]
    archive, members, (meta, labels_key, names_key) = CIFAR[name]
    class_names = [b"class_%d" % number for number in range(classes)]
    contents, splits = {"readme.html": b"<html>", meta: pickle_dict({names_key: class_names})}, {}
    for split, files in members.items():
        pixels = rng.integers(0, 256, (len(files), 7, 3, 32, 32), dtype=np.uint8)
        labels = rng.integers(0, classes, (len(files), 7))
        for file, *batch in zip(files, pixels.reshape(-1, 7, 3072), labels, strict=True):
            contents[file] = pickle_dict({b"data": batch[0], labels_key: batch[1].tolist()})
        splits[split] = (pixels.transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3), labels.ravel())
    path = folder / archive
    write_archive(path, contents)
    take_for_published(path, name, monkeypatch)
    return splits


def take_for_published(path: Path, name: str, monkeypatch) -> None:
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(_load.DATASETS, name, _load._cifar(name, path.name, md5=md5))


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def pickle_dict(values: dict[bytes, object]) -> bytes:
    """Makes a pickle like those of Python 2 and its numpy: byte strings, arrays by old names."""
    items = b"".join(_pickle(item) for pair in values.items() for item in pair)
    return b"\x80\x02}(" + items + b"u."


def _pickle(value: object) -> bytes:
    match value:
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case int():
            return b"J" + struct.pack("<i", value)
        case list():
            return b"(" + b"".join(map(_pickle, value)) + b"l"
        case np.ndarray():
            array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
            dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + 2 * _pickle(-1)
            shape = b"(" + b"".join(map(_pickle, value.shape)) + b"t"
            content = _pickle(value.tobytes())
            return array + b"(K\x01" + shape + dtype + b"K\x00tb\x89" + content + b"tb"
    raise TypeError(value)
