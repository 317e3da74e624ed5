"""Splits that tensorflow-datasets prepared, read by random access without TensorFlow."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsbcn_flax._extras import require
from wsbcn_flax.data._sources import EncodedSource, ImageSource

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def load_prepared(folder: Path, split: str, *, name: str) -> EncodedSource | ImageSource:
    """Opens a split, and reads it into memory if all its images are of one size."""
    tfds, _ = (require(each, extra="train") for each in ("tensorflow_datasets", "array_record"))
    builder, wanted = tfds.builder_from_directory(folder), tfds.core.FileFormat.ARRAY_RECORD
    formats, features = builder.info.available_file_formats(), builder.info.features
    if wanted not in formats:
        raise ValueError(
            f"{folder} must be in the array_record format, which alone reads without TensorFlow; "
            f"it is in {', '.join(sorted(each.value for each in formats))}. Prepare it again in "
            f"another data_dir: tfds build {builder.name} --file_format=array_record --data_dir=DIR"
        )
    image, label = (dict(features.items()).get(key, features) for key in ("image", "label"))
    kinds = isinstance(image, tfds.features.Image), isinstance(label, tfds.features.ClassLabel)
    if not all(kinds) or image.np_dtype != np.uint8:
        raise ValueError(
            f"{folder} must hold uint8 images under 'image' and classes under 'label', "
            f"received {features}"
        )
    resolve_slices(split, builder.info.splits, dataset=name)
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split=split, decoders=decoders, file_format=wanted)
    records, names = _PreparedRecords(folder, source), tuple(label.names)
    described: Any = {"num_classes": len(names), "name": name, "class_names": names}
    if None in image.shape:
        return EncodedSource(records=records, **described)
    read = records.read_all()
    images, labels = ([record[key] for record in read] for key in ("image", "label"))
    pixels = np.stack([_decode(each).reshape(image.shape) for each in images])
    return ImageSource(images=pixels, labels=np.array(labels, np.int32), **described)


def _decode(png: bytes) -> np.ndarray:
    with require("PIL.Image", extra="train").open(io.BytesIO(png)) as image:
        return np.asarray(image)


@dataclasses.dataclass(frozen=True)
class _PreparedRecords:
    """The records of a split in a folder, with images left encoded."""

    folder: Path
    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        with self._explain_damage():
            return self.source[index]

    def read_all(self) -> list[Mapping[str, Any]]:
        """Reads all records, faster than one by one."""
        with self._explain_damage():
            return self.source.__getitems__(range(len(self)))

    @contextlib.contextmanager
    def _explain_damage(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # array_record keeps checksums.
            raise RuntimeError(
                f"{self.folder} is damaged, delete it and prepare it again ({error})"
            ) from error


def resolve_slices(
    split: str, infos: "Mapping[str, tfds.core.SplitInfo]", *, dataset: str
) -> list[tuple[str, range]]:
    """Returns the named splits, and the part of each, that make up a split in tfds's syntax."""
    tfds = require("tensorflow_datasets", extra="train")
    try:
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(dict(infos))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"split of {dataset!r} must be in tfds's syntax over {', '.join(infos)}, "
            f"such as 'train' or 'train[:90%]'; received {split!r} ({error})"
        ) from error
    slices = [
        (each.splitname, range(infos[each.splitname].num_examples)[each.from_ : each.to])
        for each in instructions
    ]
    if not any(part for _, part in slices):
        raise ValueError(f"split {split!r} of {dataset!r} holds no image; widen the slice")
    return slices
