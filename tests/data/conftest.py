"""Data sets prepared once for all tests of a run, and writers of tiny source files."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsbcn_flax.data import ImageSplit, load_split


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory):
    """A data_dir in which the packaged data sets are prepared; tests must not write to it."""
    data_dir = tmp_path_factory.mktemp("prepared")
    for name in ("mnist5k", "digits"):
        load_split(name, "train", data_dir=data_dir)
    return data_dir


@pytest.fixture
def coded_split() -> Callable[[int], ImageSplit]:
    """Makes splits whose labels number the images, and whose images all differ."""

    def make(count: int) -> ImageSplit:
        images = np.random.default_rng(count).integers(1, 256, (count, 5, 6, 3), dtype=np.uint8)
        labels = np.arange(count, dtype=np.int32)
        return ImageSplit(images=images, labels=labels, num_classes=count, name="coded")

    return make


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def write_idx_folder():
    """Writes the four idx files of a tiny data set and returns its arrays by split."""

    def write(folder: Path, *, seed: int = 0, size: int = 28, num_classes: int = 10):
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        splits = {}
        for split, prefix, count in (("train", "train", 30), ("test", "t10k", 20)):
            images = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
            labels = np.arange(count) % num_classes
            write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
            write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
            splits[split] = (images[..., np.newaxis], labels)
        return splits

    return write
