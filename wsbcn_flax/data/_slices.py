"""The part of a data set that a split in tensorflow-datasets's syntax means."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def resolve_slices(
    split: str, infos: "Mapping[str, tfds.core.SplitInfo]", *, dataset: str
) -> list[tuple[str, range]]:
    """The named splits, and the part of each, that a split in tfds's syntax is made of.

    Args:
        split: such as ``"train"``, ``"train[:90%]"`` or ``"train[10:20]+test"``.
        infos: of every named split, its size.
        dataset: for messages.

    Returns:
        Names and ranges, to be joined.

    Raises:
        ValueError: if the split is not in that syntax, names another split, exceeds one, or is
            empty.
    """
    import tensorflow_datasets as tfds

    named: Any = dict(infos)
    try:
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(named)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"split of {dataset!r} must be in tfds's syntax over {', '.join(infos)}, "
            f"such as 'train' or 'train[:90%]'; got {split!r} ({error})"
        ) from error
    slices = [
        (each.splitname, range(infos[each.splitname].num_examples)[each.from_ : each.to])
        for each in instructions
    ]
    if not any(part for _, part in slices):
        raise ValueError(f"split {split!r} of {dataset!r} holds no image; widen the slice")
    return slices
