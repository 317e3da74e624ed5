"""Reads splits that tensorflow-datasets prepared, and its split syntax, without TensorFlow."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsbcn_flax._extras import require
from wsbcn_flax.data._sources import EncodedSource, ImageSource


def find_prepared(dataset: Path) -> Path | None:
    """Returns the folder of the newest version that tfds prepared in a dataset's folder."""
    # tfds writes this file last, in a folder "incomplete.*" that it then renames.
    found = [info.parent for info in dataset.glob("*/dataset_info.json")]
    versions = [each for each in found if re.fullmatch(r"\d+\.\d+\.\d+", each.name)]
    return max(versions, key=lambda it: [int(n) for n in it.name.split(".")], default=None)


def load_prepared(folder: Path, split: str, *, name: str) -> EncodedSource | ImageSource:
    """Opens a split, and reads it into memory if all its images have one size."""
    tfds, _ = (require(each, extra="train") for each in ("tensorflow_datasets", "array_record"))
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # tfds may raise anything for damaged metadata.
        raise ValueError(
            f"{folder} must hold a prepared dataset with dataset_info.json and features.json; one "
            "of them is missing or damaged. Delete the folder and prepare it again "
            f"({type(error).__name__}: {error!s:.200})."
        ) from error
    wanted = tfds.core.FileFormat.ARRAY_RECORD
    formats, features = builder.info.available_file_formats(), builder.info.features
    if wanted not in formats:
        raise ValueError(
            f"{folder} must be in array_record, the only format that reads without TensorFlow; "
            f"it is in {', '.join(sorted(each.value for each in formats))}. Prepare it again in "
            f"another data_dir: tfds build {builder.name} --file_format=array_record --data_dir=DIR"
        )
    sizes = {each: info.num_examples for each, info in builder.info.splits.items()}
    resolve_slices(split, sizes, dataset=name)
    is_encoded = None in features["image"].shape
    decoders = {"image": tfds.decode.SkipDecoding()} if is_encoded else None
    source = builder.as_data_source(split=split, decoders=decoders, file_format=wanted)
    records, names = _PreparedRecords(folder, source), tuple(features["label"].names)
    described: Any = {"num_classes": len(names), "name": name, "class_names": names}
    if is_encoded:
        return EncodedSource(records=records, **described)
    read = records.__getitems__(range(len(records)))
    images, labels = (np.stack([record[key] for record in read]) for key in ("image", "label"))
    return ImageSource(images=images, labels=labels.astype(np.int32), **described)


@dataclasses.dataclass(frozen=True)
class _PreparedRecords:
    """The records of a split in a folder."""

    folder: Path
    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Reads several records, faster than one by one."""
        try:
            return self.source.__getitems__(indices)
        except RuntimeError as error:  # array_record keeps checksums.
            raise RuntimeError(
                f"{self.folder} is damaged, delete it and prepare it again ({error})"
            ) from error


def resolve_slices(
    split: str, sizes: Mapping[str, int], *, dataset: str
) -> list[tuple[str, slice]]:
    """Returns the named splits, with the slice of each, that a split in tfds's syntax selects."""
    tfds = require("tensorflow_datasets", extra="train")
    infos = {
        each: tfds.core.SplitInfo(name=each, shard_lengths=[size], num_bytes=0)
        for each, size in sizes.items()
    }
    try:
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"split of {dataset!r} must be in tfds's syntax over {', '.join(infos)}, "
            f"such as 'train' or 'train[:90%]'; received {split!r} ({error})"
        ) from error
    slices = [(each.splitname, slice(each.from_, each.to)) for each in instructions]
    if not any(range(sizes[each])[part] for each, part in slices):
        raise ValueError(f"split {split!r} of {dataset!r} holds no image; widen the slice")
    return slices
