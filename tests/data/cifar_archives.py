"""Tiny archives in the very format in which CIFAR-10 and CIFAR-100 are published."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import python2_pickle

from wsbcn_flax.data._cifar import CifarLayout

Splits = dict[str, tuple[np.ndarray, np.ndarray]]
BATCH = 7


def cifar_members(layout: CifarLayout, *, seed: int = 0) -> tuple[dict[str, Any], Splits]:
    """What the members hold, and the images ``[N, 32, 32, 3]`` and labels of each split."""
    rng = np.random.default_rng(seed)
    members, splits = {}, {}
    for split, names in layout.splits.items():
        pixels = rng.integers(0, 256, (len(names), BATCH, 3, 32, 32), dtype=np.uint8)
        labels = rng.integers(0, layout.num_classes, (len(names), BATCH))
        for name, pixels_of_batch, labels_of_batch in zip(names, pixels, labels, strict=True):
            members[name] = {
                b"batch_label": name.encode(),
                layout.labels_key: labels_of_batch.tolist(),
                b"data": pixels_of_batch.reshape(BATCH, -1),
                b"filenames": [b"an_image.png"] * BATCH,
            }
        images = pixels.transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3)
        splits[split] = (images, labels.ravel())
    names = [f"class_{number}".encode() for number in range(layout.num_classes)]
    members[layout.meta] = {layout.names_key: names}
    return members, splits


def write_archive(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        folders = {Path(name).parent for name in members} - {Path()}
        for folder in folders:
            member = tarfile.TarInfo(str(folder))
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_cifar(
    folder: Path,
    layout: CifarLayout,
    *,
    seed: int = 0,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Splits:
    """Writes an archive into ``folder``; ``change`` edits its members before they are pickled."""
    members, splits = cifar_members(layout, seed=seed)
    if change is not None:
        change(members)
    pickles = {name: python2_pickle.dumps(member) for name, member in members.items()}
    write_archive(folder / layout.archive, {**pickles, f"{layout.meta}.html": b"<html>"})
    return splits
