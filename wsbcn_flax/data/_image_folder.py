"""Image files in one folder for each class, as torchvision's ImageFolder reads them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsbcn_flax.data._encoded_split import EncodedSplit
from wsbcn_flax.data._slices import resolve_slices

_SUFFIXES = (".jpeg", ".jpg", ".png")
_FOLDERS = {"train": ("train",), "validation": ("val", "validation")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecords:
    """Records ``{"image": bytes, "label": int, "file_name": str}`` of image files.

    Attributes:
        root: folder that the files are named from.
        files: their names.
        labels: int ``[N]``, of each file.
    """

    root: Path
    files: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def part(self, where: slice) -> "FileRecords":
        """Some of the records."""
        return FileRecords(root=self.root, files=self.files[where], labels=self.labels[where])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        name = self.files[index]
        content = (self.root / name).read_bytes()
        return {"image": content, "label": int(self.labels[index]), "file_name": name}


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of those of "train" and "validation" that are in ``root``."""
    return {
        split: root / name
        for split, names in _FOLDERS.items()
        for name in names
        if (root / name).is_dir()
    }


def load_image_folder(root: Path, split: str, *, name: str) -> EncodedSplit:
    """The files ``{train,val}/CLASS/*.JPEG`` in ``root``, labelled by the order of the classes.

    The files of a split are sorted, then shuffled once, the same on every machine: a slice holds
    images of all classes.

    Args:
        root: holds the folders of the splits; "validation" serves for "val", .jpg and .png for
            .JPEG, in small letters or capitals.
        split: in tfds's syntax over "train" and "validation".
        name: of the data set.

    Raises:
        ValueError: if there is no such split, it is empty, or the splits have different classes.
    """
    import tensorflow_datasets as tfds

    folders = split_folders(root)
    class_names = _class_names(folders)
    # Listing a million files takes a while: only what is asked for is listed.
    asked_for = [each for each in folders if each in split] or list(folders)
    listed = {each: _list_files(root, folders[each], class_names) for each in asked_for}
    infos = {
        each: tfds.core.SplitInfo(name=each, shard_lengths=[len(records)], num_bytes=0)
        for each, records in listed.items()
    }
    parts = [
        listed[each].part(slice(part.start, part.stop))
        for each, part in resolve_slices(split, infos, dataset=name)
    ]
    records = FileRecords(
        root=root,
        files=[file for part in parts for file in part.files],
        labels=np.concatenate([part.labels for part in parts]),
    )
    return EncodedSplit(
        source=records, num_classes=len(class_names), name=name, class_names=class_names
    )


def _class_names(folders: Mapping[str, Path]) -> tuple[str, ...]:
    """The classes, which must be the same in every split: labels count them."""
    found = {
        folder: {entry.name for entry in folder.iterdir() if entry.is_dir()}
        for folder in folders.values()
    }
    for folder, names in found.items():
        if not names:
            raise ValueError(
                f"{folder} must hold a folder of images for each class, received none; sort the "
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


def _list_files(root: Path, folder: Path, class_names: Sequence[str]) -> FileRecords:
    by_class = [
        sorted(
            f"{folder.name}/{class_name}/{file}"
            for file in os.listdir(folder / class_name)
            if file.lower().endswith(_SUFFIXES)
        )
        for class_name in class_names
    ]
    files = [file for files in by_class for file in files]
    labels = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class])
    # numpy freezes the stream of RandomState for good; default_rng's may change with a release.
    order = np.random.RandomState(0).permutation(len(files))
    return FileRecords(root=root, files=[files[index] for index in order], labels=labels[order])
