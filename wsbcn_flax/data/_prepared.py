"""Reads what tensorflow-datasets prepared, with images left encoded."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsbcn_flax.data._slices import resolve_slices

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


class PreparedRecords:
    """The records of a split, ``{"image": bytes, "label": int, ...}``, by random access.

    Args:
        builder: of a data set prepared in the array_record format.
        split: in tfds's syntax.
        name: of the data set, for messages.

    Raises:
        ValueError: if there is no such split, or it is empty.
    """

    def __init__(self, builder: Any, split: str, *, name: str) -> None:
        import tensorflow_datasets as tfds

        resolve_slices(split, builder.info.splits, dataset=name)
        self._folder = builder.data_dir
        self._source: Any = builder.as_data_source(
            split=split,
            decoders={"image": tfds.decode.SkipDecoding()},
            file_format=tfds.core.FileFormat.ARRAY_RECORD,
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        with self._explain_damage():
            return self._source[index]

    def read_all(self) -> list[Mapping[str, Any]]:
        """All records, read faster than one by one.

        Raises:
            RuntimeError: if the files are damaged.
        """
        with self._explain_damage():
            return self._source.__getitems__(range(len(self)))

    @contextlib.contextmanager
    def _explain_damage(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # array_record keeps checksums
            raise RuntimeError(
                f"{self._folder} is damaged, delete it and prepare it again ({error})"
            ) from error


def open_prepared(folder: Path) -> "tfds.core.DatasetBuilder":
    """The builder of a data set prepared in ``folder``, which can be read without TensorFlow.

    Raises:
        ValueError: if it is in another format than array_record.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    formats = builder.info.available_file_formats()
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        raise ValueError(
            f"{folder} must be in the array_record format, which alone reads without TensorFlow; "
            f"it is in {', '.join(sorted(each.value for each in formats))}. Prepare it again in "
            f"another data_dir: tfds build {builder.name} --file_format=array_record --data_dir=DIR"
        )
    return builder


def image_shape_and_class_names(
    builder: "tfds.core.DatasetBuilder",
) -> tuple[tuple[int | None, ...], tuple[str, ...]]:
    """Checks that a data set is of uint8 images and classes.

    Returns:
        The shape of the images, None for what varies, and the names of the classes.

    Raises:
        ValueError: if it is a data set of anything else.
    """
    import tensorflow_datasets as tfds

    features: Any = builder.info.features
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    well_typed = all(
        key in features and isinstance(features[key], kind) for key, kind in kinds.items()
    )
    if not well_typed or features["image"].np_dtype != np.uint8:
        raise ValueError(
            f"{builder.data_dir} must hold uint8 images under 'image' and classes under 'label', "
            f"got {features}"
        )
    return features["image"].shape, tuple(features["label"].names)
