"""The folder of four gzipped idx files in which MNIST and its imitations are handed around."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from wsbcn_flax.data._idx import read_idx_pair

_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
IDX_FILES: tuple[str, ...] = tuple(name for pair in _FILES.values() for name in pair)


def read_idx_folder(
    folder: str | os.PathLike[str],
) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the splits "train" and "test" of a folder of idx files.

    Args:
        folder: holds ``{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``.

    Returns:
        For each split ``(images, labels)``: uint8 ``[N, height, width, 1]`` and uint8 ``[N]``.

    Raises:
        FileNotFoundError: if a file is missing.
        IdxFormatError: if a file is not what it should be, see `read_idx_pair`.
    """
    return {
        split: read_idx_pair(*(Path(folder, name) for name in pair))
        for split, pair in _FILES.items()
    }
