"""Reader of gzipped idx files, the format of MNIST and of the data sets that imitate it."""

import math
import os
from pathlib import Path

import numpy as np

from wsbcn_flax.data._gzip import read_gzip

_UINT8 = 0x08


class IdxFormatError(ValueError):
    """A file that is not the gzipped idx file it should be."""


def read_idx(path: str | os.PathLike[str], *, ndim: int) -> np.ndarray:
    """Reads one gzipped idx file of unsigned bytes.

    The file is two zero bytes, the element type (8 for uint8), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the elements in C order.

    Args:
        path: the ``.gz`` file.
        ndim: number of dimensions it must have: 3 for images, 1 for labels.

    Returns:
        uint8 array of ``ndim`` dimensions, read-only.

    Raises:
        FileNotFoundError: if there is no such file.
        IdxFormatError: if it is not gzip, is cut short, has another magic number, or holds more or
            fewer elements than its header says.
    """
    content = read_gzip(Path(path), error=IdxFormatError)
    header_size = 4 + 4 * ndim
    expected_magic = bytes([0, 0, _UINT8, ndim])
    if content[:4] != expected_magic:
        raise IdxFormatError(
            f"{path}: an idx file of uint8 with {ndim} dimension(s) starts with the bytes "
            f"{expected_magic.hex()}, got {content[:4].hex() or 'nothing'}; "
            "are images and labels mixed up?"
        )
    if len(content) < header_size:
        raise IdxFormatError(f"{path}: cut short inside the header, after {len(content)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=ndim, offset=4))
    elements = np.frombuffer(content, np.uint8, offset=header_size)
    if len(elements) != math.prod(shape):
        raise IdxFormatError(
            f"{path}: the header says {' x '.join(map(str, shape))} bytes, the file holds "
            f"{len(elements)}; fetch it again"
        )
    return elements.reshape(shape)


def read_idx_pair(
    images_path: str | os.PathLike[str], labels_path: str | os.PathLike[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images and the labels of one split.

    Args:
        images_path: gzipped idx file of ``[N, height, width]``.
        labels_path: gzipped idx file of ``[N]``.

    Returns:
        ``(images, labels)``: uint8 ``[N, height, width, 1]`` and uint8 ``[N]``.

    Raises:
        FileNotFoundError: if a file is missing.
        IdxFormatError: as `read_idx`, and if there are no images or not one label for each.
    """
    images = read_idx(images_path, ndim=3)
    labels = read_idx(labels_path, ndim=1)
    if len(images) != len(labels) or not len(images):
        raise IdxFormatError(
            f"there must be one label for each image and at least one image, got {len(images)} "
            f"images in {images_path} and {len(labels)} labels in {labels_path}"
        )
    return images[..., np.newaxis], labels
