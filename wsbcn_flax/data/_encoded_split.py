"""A split of encoded images too many to decode into memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from wsbcn_flax.data._split import complete_class_names


class Records(Protocol):
    """Random access to records, from any number of threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSplit:
    """A labelled split of images of any size, encoded as JPEG or PNG.

    Attributes:
        source: gives for an index the record ``{"image": bytes, "label": int}``, the label in
            ``[0, num_classes)``; "file_name", if there, serves messages. Any sequence serves, and
            must bear being read by several threads.
        num_classes: number of classes of the data set (not of this split).
        name: name of the data set, for messages and logs.
        class_names: by label; the labels themselves, as text, if not given.

    Raises:
        ValueError: if the split is empty or there are names for another number of classes.

    Example:
        >>> split = EncodedSplit(
        ...     source=[{"image": b"...", "label": 1}, {"image": b"...", "label": 0}],
        ...     num_classes=2,
        ...     name="pets",
        ...     class_names=("cat", "dog"),
        ... )
        >>> len(split), split.class_names[split.source[0]["label"]]
        (2, 'dog')
    """

    source: Records
    num_classes: int
    name: str
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.source):
            raise ValueError(f"{self.name}: a split must hold at least one image, received none")
        names = complete_class_names(self.class_names, self.num_classes, dataset=self.name)
        object.__setattr__(self, "class_names", names)

    def __len__(self) -> int:
        return len(self.source)
