"""Loads a split of a named data set into memory."""

import difflib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsbcn_flax.data._locate import PUBLIC_NAMES, default_data_dir, find_public
from wsbcn_flax.data._prepare import OWN_NAMES, ensure_prepared
from wsbcn_flax.data._split import ImageSplit

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def dataset_names() -> tuple[str, ...]:
    """Names that `load_split` knows, sorted.

    Example:
        >>> dataset_names()
        ('cifar10', 'cifar100', 'digits', 'fashion_mnist', 'mnist', 'mnist5k')
    """
    return tuple(sorted((*OWN_NAMES, *PUBLIC_NAMES)))


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
    some ten seconds. "cifar10", "cifar100" and "mnist" are read if tensorflow-datasets prepared
    them earlier, in the array_record format.

    Args:
        name: one of `dataset_names`.
        split: tfds's syntax over "train" and "test", such as ``"train"``, ``"train[:90%]"``,
            ``"train[4000:]"`` or ``"train+test"``.
        data_dir: folder of prepared data sets, by default `default_data_dir`; public sets are also
            looked for in tfds's own default folder.
        source_dir: for "fashion_mnist", the folder of its four gzipped idx files (any files in
            MNIST's format serve); by default ``downloads/manual`` in ``data_dir``, then where
            Debian's package dataset-fashion-mnist puts them.
        prepare: False to fail rather than prepare a data set on first use.

    Returns:
        The split, in the order of the prepared files: shuffled once, the same on every machine.

    Raises:
        ValueError: if the name or the split is unknown, the split is empty, ``source_dir`` is not
            what the data set was prepared from, or the prepared data are not what they should be.
        DatasetNotFoundError: if the data are not on this machine; says how to get them.
        ImportError: if the package that carries the data is not installed; names the extra.
        RuntimeError: if the prepared files are damaged.
    """
    if name not in dataset_names():
        close = difflib.get_close_matches(name, dataset_names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name must be one of {', '.join(dataset_names())}; got {name!r}{hint}")
    if source_dir is not None and name != "fashion_mnist":
        raise ValueError(f"source_dir is for 'fashion_mnist' only, got it for {name!r}")
    root = None if data_dir is None else Path(data_dir).expanduser()
    if name in PUBLIC_NAMES:
        folder = find_public(name, root)
    else:
        folder = ensure_prepared(
            name,
            root or default_data_dir(),
            source_dir=None if source_dir is None else Path(source_dir).expanduser(),
            prepare=prepare,
        )
    return _read(folder, name, split)


def _read(folder: Path, name: str, split: str) -> ImageSplit:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(folder)
    _check_format(builder.info, folder)
    image_shape, num_classes = _shape_and_classes(builder.info, folder)
    _check_split(builder.info, name, split)
    records = _read_records(builder, split)
    return ImageSplit(
        images=np.stack([_decode(record["image"], image_shape) for record in records]),
        labels=np.array([record["label"] for record in records], np.int32),
        num_classes=num_classes,
        name=name,
    )


def _read_records(builder: Any, split: str) -> list[dict[str, Any]]:
    import tensorflow_datasets as tfds

    try:
        source = builder.as_data_source(
            split=split,
            decoders={"image": tfds.decode.SkipDecoding()},
            file_format=tfds.core.FileFormat.ARRAY_RECORD,
        )
        return source.__getitems__(range(len(source)))
    except RuntimeError as error:  # array_record keeps checksums
        raise RuntimeError(
            f"{builder.data_dir} is damaged, delete it and prepare it again ({error})"
        ) from error


def _check_format(info: "tfds.core.DatasetInfo", folder: Path) -> None:
    import tensorflow_datasets as tfds

    formats = info.available_file_formats()
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        raise ValueError(
            f"{folder} must be in the array_record format, which alone reads without TensorFlow; "
            f"it is in {', '.join(sorted(each.value for each in formats))}. Prepare it again in "
            f"another data_dir: tfds build {info.name} --file_format=array_record --data_dir=DIR"
        )


def _shape_and_classes(
    info: "tfds.core.DatasetInfo", folder: Path
) -> tuple[tuple[int, int, int], int]:
    import tensorflow_datasets as tfds

    features: Any = info.features
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    well_typed = all(
        key in features and isinstance(features[key], kind) for key, kind in kinds.items()
    )
    if not well_typed or features["image"].np_dtype != np.uint8 or None in features["image"].shape:
        raise ValueError(
            f"{folder} must hold uint8 images of one size under 'image' and classes under 'label', "
            f"got {features}"
        )
    return features["image"].shape, features["label"].num_classes


def _check_split(info: "tfds.core.DatasetInfo", name: str, split: str) -> None:
    splits = info.splits
    try:
        count = splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"split of {name!r} must be in tfds's syntax over {', '.join(splits)}, "
            f"such as 'train' or 'train[:90%]'; got {split!r} ({error})"
        ) from error
    if count <= 0:
        raise ValueError(f"split {split!r} of {name!r} holds no image; widen the slice")


def _decode(png: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image)
    return pixels.reshape(shape)
