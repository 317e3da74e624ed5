"""Finds data sets of encoded images, which are decoded while they are used."""

import os
import re
from pathlib import Path

from wsbcn_flax.data._encoded_split import EncodedSplit
from wsbcn_flax.data._image_folder import load_image_folder, split_folders
from wsbcn_flax.data._locate import DatasetNotFoundError, find_public, search_roots
from wsbcn_flax.data._prepared import PreparedRecords, image_shape_and_class_names, open_prepared

_TFDS_NAME = "imagenet2012"


def load_encoded_split(
    name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None
) -> EncodedSplit:
    """Opens a split of ImageNet (ILSVRC 2012) without reading its images, or the network.

    It is read from what tensorflow-datasets prepared as ``imagenet2012`` in the array_record
    format, or else from JPEG files ``imagenet/{train,val}/CLASS/*.JPEG`` in the same folder, as
    torchvision unpacks them. Either way classes are the WordNet IDs in order.

    Args:
        name: "imagenet".
        split: tfds's syntax over "train" and "validation" (or "val"), such as ``"train"``,
            ``"train[:1%]"`` or ``"val"``.
        data_dir: folder of data sets, by default `default_data_dir` and then tfds's own.

    Returns:
        The split, shuffled once, the same on every machine.

    Raises:
        ValueError: if the name or the split is unknown, the split is empty, or the data are not
            what they should be.
        DatasetNotFoundError: if the data are not on this machine; says how to get them.
    """
    if name != "imagenet":
        raise ValueError(f"name must be 'imagenet'; received {name!r}: try load_split")
    roots = search_roots(None if data_dir is None else Path(data_dir).expanduser())
    split = re.sub(r"\bval\b", "validation", split)
    if folder := find_public(_TFDS_NAME, roots):
        return _load_prepared(folder, split, name=name)
    for root in roots:
        if split_folders(root / name):
            return load_image_folder(root / name, split, name=name)
    raise DatasetNotFoundError(_explain(roots))


def _load_prepared(folder: Path, split: str, *, name: str) -> EncodedSplit:
    builder = open_prepared(folder)
    _, class_names = image_shape_and_class_names(builder)
    return EncodedSplit(
        source=PreparedRecords(builder, split, name=name),
        num_classes=len(class_names),
        name=name,
        class_names=class_names,
    )


def _explain(roots: tuple[Path, ...]) -> str:
    folder = roots[0]
    return (
        f"ImageNet is neither prepared as {_TFDS_NAME} nor unpacked as imagenet/train/CLASS/*.JPEG "
        f"and imagenet/val/CLASS/*.JPEG in {' or '.join(map(str, roots))}. On a machine with "
        "internet, get ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
        "ILSVRC2012_devkit_t12.tar.gz from https://image-net.org (after signing in) into a folder "
        "TARS. Either run: pip install tensorflow tensorflow-datasets && "
        f"tfds build {_TFDS_NAME} --file_format=array_record --manual_dir=TARS --data_dir=DIR; "
        f"then copy DIR/{_TFDS_NAME} into {folder}, or pass data_dir=DIR. Or run: "
        'pip install torchvision scipy && python -c "from torchvision.datasets import ImageNet; '
        "ImageNet('TARS', 'train'); ImageNet('TARS', 'val')\"; then move TARS/train and TARS/val "
        f"into {folder / 'imagenet'}."
    )
