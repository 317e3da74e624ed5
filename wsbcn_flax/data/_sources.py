"""Sources of labelled images, in memory or encoded and decoded on the fly."""

import dataclasses
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np

from wsbcn_flax.data._pipeline import Source


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Described(Sized):
    num_classes: int
    name: str
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(f"{self.name}: there must be at least one image, received none")
        names, count = tuple(self.class_names), self.num_classes
        if names and len(names) != count:
            raise ValueError(
                f"{self.name}: class_names must be one for each of {count} classes, received "
                f"{len(names)}"
            )
        object.__setattr__(self, "class_names", names or tuple(map(str, range(count))))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource(_Described):
    """Labelled images of one size, in memory.

    Example i is ``{"image": uint8 [height, width, channels], "label": int32}``.

    Attributes:
        images: Pixels from 0 to 255, uint8 ``[N, height, width, channels]``.
        labels: Class of each image in ``[0, num_classes)``, int32 ``[N]``.
        num_classes: Number of classes of the dataset (not of this split).
        name: Name of the dataset, for messages and logs.
        class_names: Names by label; defaults to the labels as text.

    Raises:
        ValueError: If a dtype, a shape, a label or the number of names breaks the rules above, or
            there is no image.

    Example:
        >>> import numpy as np
        >>> images, labels = np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 1], np.int32)
        >>> source = ImageSource(images=images, labels=labels, num_classes=2, name="blank")
        >>> len(source), source.image_shape, source.class_names[source[2]["label"]]
        (3, (8, 8, 1), '1')
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        images, labels, count = self.images, self.labels, self.num_classes
        kinds = images.dtype == np.uint8 and images.ndim == 4, labels.dtype == np.int32
        shapes = images.size and labels.shape == images.shape[:1]
        if not all(kinds) or not shapes or labels.min() < 0 or labels.max() >= count:
            raise ValueError(
                f"{self.name}: images must be uint8 [N, height, width, channels], not empty, and "
                f"labels int32 [N] in [0, num_classes={count}), received {images.dtype} "
                f"{list(images.shape)} and {labels.dtype} {list(labels.shape)} from "
                f"{labels.min(initial=0)} to {labels.max(initial=0)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.take(index)

    def take(self, indices: Any) -> dict[str, Any]:
        """Copies the examples at ``indices`` into one batch."""
        return {"image": self.images[indices], "label": self.labels[indices]}

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels of every image."""
        return self.images.shape[1:]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSource(_Described):
    """Labelled images of any size, encoded as JPEG or PNG.

    Example i is record i with its label as int32: ``{"image": bytes, "label": int32, ...}``.

    Attributes:
        records: Sequence of ``{"image": bytes, "label": int}`` that several threads may read. Error
            messages use the entry "file_name", if there is one.
        num_classes, name, class_names: As in `ImageSource`.

    Raises:
        ValueError: If there is no record, or not one name for each class; while reading, if a label
            is not in ``[0, num_classes)``.

    Example:
        >>> records = [{"image": b"...", "label": 1}, {"image": b"...", "label": 0}]
        >>> source = EncodedSource(records=records, num_classes=2, name="pets")
        >>> len(source), source[0]["label"].dtype
        (2, dtype('int32'))
    """

    records: Source

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        record = self.records[index]
        label = record["label"]
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{file_name(record, 'the')} label must be in [0, {self.num_classes}), received "
                f"{label}; is this a test split whose labels are secret?"
            )
        return {**record, "label": np.int32(label)}


@dataclasses.dataclass(frozen=True)
class FileRecords:
    """Records ``{"image": bytes, "label": int, "file_name": str}`` of image files in a folder."""

    folder: Path
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        name, label = str(self.names[index]), int(self.labels[index])
        return {"image": (self.folder / name).read_bytes(), "label": label, "file_name": name}


def file_name(record: Mapping[str, Any], default: str) -> str:
    """Returns an example's file name for messages; tfds gives the name as bytes."""
    name = record.get("file_name", default)
    return name.decode() if isinstance(name, bytes) else name
