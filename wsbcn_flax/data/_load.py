"""Loads a split of a named data set into memory."""

import difflib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from wsbcn_flax.data._locate import (
    PUBLIC_NAMES,
    DatasetNotFoundError,
    explain_public,
    find_public,
    search_roots,
)
from wsbcn_flax.data._prepare import OWN_NAMES, ensure_prepared
from wsbcn_flax.data._prepared import PreparedRecords, image_shape_and_class_names, open_prepared
from wsbcn_flax.data._source_files import SOURCE_FILES
from wsbcn_flax.data._split import ImageSplit


def dataset_names() -> tuple[str, ...]:
    """Names that `load_split` knows, sorted.

    Example:
        >>> dataset_names()
        ('cifar10', 'cifar100', 'digits', 'fashion_mnist', 'mnist', 'mnist5k')
    """
    return tuple(sorted({*OWN_NAMES, *PUBLIC_NAMES}))


def load_split(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source_dir: str | os.PathLike[str] | None = None,
    prepare: bool = True,
) -> ImageSplit:
    """Loads a split of a data set into memory, never touching the network.

    "mnist5k" (5,000 images of MNIST) and "digits" (1,797 of 8x8 pixels) come with Python packages
    and are prepared on first use, in a second or two; "fashion_mnist" likewise from idx files, in
    ten or twenty seconds. "cifar10", "cifar100" and "mnist" are read if tensorflow-datasets
    prepared them earlier, in the array_record format; otherwise "cifar10" and "cifar100" are
    prepared on first use from the python archives that their authors publish.

    Args:
        name: one of `dataset_names`.
        split: tfds's syntax over "train" and "test", such as ``"train"``, ``"train[:90%]"``,
            ``"train[4000:]"`` or ``"train+test"``.
        data_dir: folder of prepared data sets, by default `default_data_dir`; public sets are also
            looked for in tfds's own default folder.
        source_dir: folder of the files that a data set is prepared from: for "fashion_mnist" its
            four gzipped idx files (any files in MNIST's format serve), for "cifar10" and "cifar100"
            ``cifar-10-python.tar.gz`` and ``cifar-100-python.tar.gz``, which then come before what
            tensorflow-datasets prepared. By default ``downloads/manual`` in ``data_dir``, then for
            "fashion_mnist" where Debian's package dataset-fashion-mnist puts them.
        prepare: False to fail rather than prepare a data set on first use.

    Returns:
        The split, in the order of the prepared files: shuffled once, the same on every machine.

    Raises:
        ValueError: if the name or the split is unknown, the split is empty, ``source_dir`` is not
            what the data set was prepared from, or the prepared data are not what they should be.
        IdxFormatError: if an idx file is not what it should be.
        CifarFormatError: if an archive of CIFAR is not what it should be.
        DatasetNotFoundError: if the data are not on this machine; says how to get them.
        ImportError: if the package that carries the data is not installed; names the extra.
        RuntimeError: if the prepared files are damaged.
    """
    if name not in dataset_names():
        close = difflib.get_close_matches(name, dataset_names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        hint = "; load_encoded_split opens it" if name == "imagenet" else hint
        raise ValueError(f"name must be one of {', '.join(dataset_names())}; got {name!r}{hint}")
    if source_dir is not None and name not in SOURCE_FILES:
        raise ValueError(
            f"source_dir is for {', '.join(map(repr, SOURCE_FILES))} only, got it for {name!r}"
        )
    folder = _locate(
        name,
        None if data_dir is None else Path(data_dir).expanduser(),
        source_dir=None if source_dir is None else Path(source_dir).expanduser(),
        prepare=prepare,
    )
    return _read(folder, name, split)


def _locate(name: str, data_dir: Path | None, *, source_dir: Path | None, prepare: bool) -> Path:
    """The folder of a data set as tfds prepared it or, failing that, as we do."""
    roots = search_roots(data_dir)
    if name not in PUBLIC_NAMES or source_dir is not None:
        return ensure_prepared(name, roots[0], source_dir=source_dir, prepare=prepare)
    if folder := find_public(name, roots):
        return folder
    if name not in OWN_NAMES:
        raise DatasetNotFoundError(explain_public(name, roots))
    try:
        return ensure_prepared(name, roots[0], source_dir=None, prepare=prepare)
    except DatasetNotFoundError as error:
        raise DatasetNotFoundError(
            f"{explain_public(name, roots)} Without TensorFlow: {error}"
        ) from error


def _read(folder: Path, name: str, split: str) -> ImageSplit:
    builder = open_prepared(folder)
    image_shape, class_names = image_shape_and_class_names(builder)
    if None in image_shape:
        raise ValueError(f"{folder} must hold images of one size, got {image_shape}")
    records = PreparedRecords(builder, split, name=name).read_all()
    return ImageSplit(
        images=np.stack([_decode(record["image"], image_shape) for record in records]),
        labels=np.array([record["label"] for record in records], np.int32),
        num_classes=len(class_names),
        name=name,
        class_names=class_names,
    )


def _decode(png: bytes, shape: tuple[Any, ...]) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image)
    return pixels.reshape(shape)
