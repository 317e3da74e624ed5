"""Image files in one folder for each class, as torchvision's ImageFolder reads them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsbcn_flax._extras import require
from wsbcn_flax.data._prepared_splits import resolve_slices
from wsbcn_flax.data._sources import EncodedSource

_SUFFIXES = (".jpeg", ".jpg", ".png")
_FOLDERS = (("train", "train"), ("validation", "val"), ("validation", "validation"))


@dataclasses.dataclass(frozen=True)
class _FileRecords:
    """Records ``{"image": bytes, "label": int, "file_name": str}`` of image files in a folder."""

    root: Path
    files: Sequence[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        name, label = self.files[index]
        return {"image": (self.root / name).read_bytes(), "label": label, "file_name": name}


def split_folders(root: Path) -> dict[str, Path]:
    """Returns the folders of those of "train" and "validation" that are in ``root``."""
    return {split: root / name for split, name in _FOLDERS if (root / name).is_dir()}


def load_image_folder(root: Path, split: str, *, name: str) -> EncodedSource:
    """Lists the files ``{train,val}/CLASS/*.JPEG`` in ``root``, labelled by sorted class name.

    The files of a split are sorted, then shuffled once, the same on every machine, so that a slice
    holds images of all classes. "validation" serves for "val", .jpg and .png for .JPEG, in small
    letters or capitals.
    """
    tfds = require("tensorflow_datasets", extra="train")
    folders = split_folders(root)
    class_names = _class_names(folders)
    # Listing a million files takes a while: only what is asked for is listed.
    asked_for = [each for each in folders if each in split] or list(folders)
    listed = {each: _list_files(folders[each], class_names) for each in asked_for}
    infos = {
        each: tfds.core.SplitInfo(name=each, shard_lengths=[len(files)], num_bytes=0)
        for each, files in listed.items()
    }
    slices = resolve_slices(split, infos, dataset=name)
    files = [file for each, part in slices for file in listed[each][part.start : part.stop]]
    return EncodedSource(
        records=_FileRecords(root, files),
        num_classes=len(class_names),
        name=name,
        class_names=class_names,
    )


def _class_names(folders: Mapping[str, Path]) -> tuple[str, ...]:
    """Returns the classes, which must be the same in every split: labels count them."""
    found = {
        folder: {entry.name for entry in folder.iterdir() if entry.is_dir()}
        for folder in folders.values()
    }
    if empty := [folder for folder, names in found.items() if not names]:
        raise ValueError(
            f"{empty[0]} must hold a folder of images for each class, received none; sort the "
            "images into folders named by their class"
        )
    everywhere = set.intersection(*found.values())
    for folder, names in found.items():
        if extra := sorted(names - everywhere):
            raise ValueError(
                f"{' and '.join(map(str, found))} must hold the same classes, received "
                f"{len(extra)} in {folder} alone, such as {extra[0]}; is one unpacked in part?"
            )
    return tuple(sorted(everywhere))


def _list_files(folder: Path, class_names: Sequence[str]) -> list[tuple[str, int]]:
    """Lists the names and labels of the files of a split."""
    files = [
        (f"{folder.name}/{class_name}/{file}", label)
        for label, class_name in enumerate(class_names)
        for file in sorted(os.listdir(folder / class_name))
        if file.lower().endswith(_SUFFIXES)
    ]
    # numpy freezes the stream of RandomState for good; default_rng's may change with a release.
    return [files[index] for index in np.random.RandomState(0).permutation(len(files))]
