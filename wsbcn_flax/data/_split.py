"""A split of an image data set, in memory."""

import dataclasses

import numpy as np


def complete_class_names(
    names: tuple[str, ...], num_classes: int, *, dataset: str
) -> tuple[str, ...]:
    """One name for each class: those given, or the numbers of the classes if none are.

    Raises:
        ValueError: if there are names for another number of classes.
    """
    if names and len(names) != num_classes:
        raise ValueError(
            f"{dataset}: class_names must be one for each of {num_classes} classes, received "
            f"{len(names)}"
        )
    return tuple(names) or tuple(map(str, range(num_classes)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageSplit:
    """A labelled split of an image data set, held in memory.

    Attributes:
        images: uint8 ``[N, height, width, channels]``, 0 to 255.
        labels: int32 ``[N]``, each in ``[0, num_classes)``.
        num_classes: number of classes of the data set (not of this split).
        name: name of the data set, for messages and logs.
        class_names: by label; the labels themselves, as text, if not given.

    Raises:
        ValueError: if a dtype, a shape, a label or the number of names breaks the rules above, or
            the split is empty.

    Example:
        >>> import numpy as np
        >>> split = ImageSplit(
        ...     images=np.zeros((3, 8, 8, 1), np.uint8),
        ...     labels=np.array([0, 1, 1], np.int32),
        ...     num_classes=2,
        ...     name="blank",
        ...     class_names=("cat", "dog"),
        ... )
        >>> len(split), split.image_shape
        (3, (8, 8, 1))
        >>> [split.class_names[label] for label in split.labels]
        ['cat', 'dog', 'dog']
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    name: str
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"{self.name}: images must be uint8 [N, height, width, channels] and not empty, "
                f"got {images.dtype} {list(images.shape)}"
            )
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.name}: labels must be int32 [{len(images)}], one for each image, "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"{self.name}: labels must be in [0, num_classes={self.num_classes}), "
                f"got {labels.min()} to {labels.max()}"
            )
        names = complete_class_names(self.class_names, self.num_classes, dataset=self.name)
        object.__setattr__(self, "class_names", names)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(height, width, channels)`` of every image."""
        _, height, width, channels = self.images.shape
        return height, width, channels
