"""Tiny files in the very formats in which Fashion-MNIST and CIFAR are published."""

import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

from wsbcn_flax.data._published_files import CIFAR10, CIFAR100, PUBLISHED_MD5, CifarLayout

CLASSES = {CIFAR10.archive: 10, CIFAR100.archive: 100}
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


def write_cifar(folder: Path, layout: CifarLayout, monkeypatch, *, seed: int = 0) -> Splits:
    """Writes an archive of 7 images a member, and has its MD5 taken for the published one."""
    rng, classes = np.random.default_rng(seed), CLASSES[layout.archive]
    names = [b"class_%d" % number for number in range(classes)]
    members, splits = {layout.meta: pickle_dict({layout.names_key: names})}, {}
    for split, names in layout.splits.items():
        pixels = rng.integers(0, 256, (len(names), 7, 3, 32, 32), dtype=np.uint8)
        labels = rng.integers(0, classes, (len(names), 7))
        for name, *batch in zip(names, pixels.reshape(-1, 7, 3072), labels, strict=True):
            members[name] = pickle_dict({b"data": batch[0], layout.labels_key: batch[1].tolist()})
        splits[split] = (pixels.transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3), labels.ravel())
    path = folder / layout.archive
    write_archive(path, members)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED_MD5, layout.archive, md5)
    return splits


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def pickle_dict(values: dict[bytes, object]) -> bytes:
    """A pickle as Python 2 and its numpy wrote them: strings of bytes, arrays by old names."""
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
