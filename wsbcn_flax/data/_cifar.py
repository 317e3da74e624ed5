"""Reader of the python archives in which CIFAR-10 and CIFAR-100 are published."""

import dataclasses
import io
import math
import os
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from wsbcn_flax.data._gzip import read_gzip
from wsbcn_flax.data._pickled_arrays import load_pickled_arrays

_CHW = (3, 32, 32)
_Batch = tuple[np.ndarray, np.ndarray]


class CifarFormatError(ValueError):
    """A file that is not the python archive of CIFAR-10 or CIFAR-100 that it should be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CifarLayout:
    """Where a python archive keeps what.

    Attributes:
        archive: file name of the gzipped tar archive.
        splits: the members that hold each split.
        meta: the member that holds the names of the classes.
        labels_key: of the labels in the members of a split.
        names_key: of the names in ``meta``.
        num_classes: number of classes.
    """

    archive: str
    splits: Mapping[str, tuple[str, ...]]
    meta: str
    labels_key: bytes
    names_key: bytes
    num_classes: int


CIFAR10 = CifarLayout(
    archive="cifar-10-python.tar.gz",
    splits={
        "train": tuple(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
        "test": ("cifar-10-batches-py/test_batch",),
    },
    meta="cifar-10-batches-py/batches.meta",
    labels_key=b"labels",
    names_key=b"label_names",
    num_classes=10,
)
CIFAR100 = CifarLayout(
    archive="cifar-100-python.tar.gz",
    splits={"train": ("cifar-100-python/train",), "test": ("cifar-100-python/test",)},
    meta="cifar-100-python/meta",
    labels_key=b"fine_labels",
    names_key=b"fine_label_names",
    num_classes=100,
)


@dataclasses.dataclass(frozen=True)
class CifarArchive:
    """What an archive holds.

    Attributes:
        splits: for "train" and "test" the images, uint8 ``[N, 32, 32, 3]``, and the labels, int64
            ``[N]``.
        class_names: by label.
    """

    splits: Mapping[str, tuple[np.ndarray, np.ndarray]]
    class_names: tuple[str, ...]


def read_cifar_archive(path: str | os.PathLike[str], layout: CifarLayout) -> CifarArchive:
    """Reads an archive in memory; nothing is extracted, and nothing in it is run.

    Args:
        path: the ``.tar.gz`` file.
        layout: `CIFAR10` or `CIFAR100`.

    Raises:
        FileNotFoundError: if there is no such file.
        CifarFormatError: if it is cut short or damaged, lacks a member, or a member holds anything
            but 32x32 colour images with one label each.
    """
    path = Path(path)
    members = {name for names in layout.splits.values() for name in names} | {layout.meta}
    contents = _read_members(path, members)
    return CifarArchive(
        splits={
            split: _concatenate(
                [_read_batch(f"{path}: {name}", contents[name], layout) for name in names]
            )
            for split, names in layout.splits.items()
        },
        class_names=_read_class_names(f"{path}: {layout.meta}", contents[layout.meta], layout),
    )


def _read_members(path: Path, names: set[str]) -> dict[str, bytes]:
    # Decompressed as a whole first: only at its end does a gzip file say whether it is intact.
    content = io.BytesIO(read_gzip(path, error=CifarFormatError))
    try:
        with tarfile.open(fileobj=content, mode="r:") as archive:
            files = {member.name: member for member in archive.getmembers() if member.isfile()}
            if missing := sorted(names - files.keys()):
                raise CifarFormatError(
                    f"{path}: the archive must hold {', '.join(sorted(names))}; it lacks "
                    f"{', '.join(missing)}"
                )
            return {name: _read_file(archive, files[name]) for name in names}
    except tarfile.TarError as error:
        raise CifarFormatError(f"{path}: not a tar archive ({error}); fetch it again") from error


def _read_file(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return cast(IO[bytes], archive.extractfile(member)).read()


def _concatenate(batches: Sequence[_Batch]) -> _Batch:
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _read_batch(source: str, content: bytes, layout: CifarLayout) -> _Batch:
    batch = _unpickle(source, content)
    pixels, labels = batch.get(b"data"), batch.get(layout.labels_key)
    size = math.prod(_CHW)
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (size,) or not len(pixels):
        shape = list(pixels.shape) if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise CifarFormatError(f"{source}: data must be uint8 [N, {size}], received {shape}")
    key = layout.labels_key.decode()
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise CifarFormatError(
            f"{source}: {key} must be a list of whole numbers, received {type(labels).__name__}"
        )
    if len(labels) != len(pixels) or min(labels) < 0 or max(labels) >= layout.num_classes:
        raise CifarFormatError(
            f"{source}: {key} must be one number in [0, {layout.num_classes}) for each of "
            f"{len(pixels)} images, received {len(labels)} from {min(labels, default=None)} to "
            f"{max(labels, default=None)}"
        )
    return pixels.reshape(-1, *_CHW).transpose(0, 2, 3, 1), np.array(labels)


def _read_class_names(source: str, content: bytes, layout: CifarLayout) -> tuple[str, ...]:
    names = _unpickle(source, content).get(layout.names_key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise CifarFormatError(
            f"{source}: {layout.names_key.decode()} must be a list of names, received "
            f"{type(names).__name__}"
        )
    if len(names) != layout.num_classes or len(set(names)) != layout.num_classes:
        raise CifarFormatError(
            f"{source}: {layout.names_key.decode()} must be {layout.num_classes} different names, "
            f"received {len(set(names))}"
        )
    return tuple(name.decode() for name in names)


def _unpickle(source: str, content: bytes) -> dict[Any, Any]:
    try:
        return load_pickled_arrays(content)
    except pickle.UnpicklingError as error:
        raise CifarFormatError(f"{source}: {error}") from error
