"""Images with boxes and masks, from an annotation file in COCO's format and a folder."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsbcn_flax.data._coco_file import label_of_category, read_coco_file


class CocoImage(NamedTuple):
    """An image file with its objects.

    Attributes:
        file_name: Name of the file in the folder of images.
        id: Id in the annotation file.
        height: Height in pixels.
        width: Width in pixels.
        boxes: Corners ``x1, y1, x2, y2`` in pixels, inside the image, float32 ``[n, 4]``.
        labels: Classes from 1 to K, int32 ``[n]``.
        segmentations: RLE of each object, or its polygons as arrays ``[2 * points]``; None if
            masks are not loaded.
    """

    file_name: str
    id: int
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    segmentations: tuple[Any, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CocoSource:
    """A source of images with boxes and masks; `load_coco` makes one.

    Example i holds the fields of the `CocoImage` i, and the content of its file under "image".

    Attributes:
        folder: Folder of the image files.
        images: Images, in the order of the annotation file.
        class_names: Names by label; 0 is the background.
        category_ids: Ids in the annotation file by label; the background's is 0.
        name: Name of the dataset, for messages and logs.
        skipped: Number of entries of each kind in the annotation file that this source leaves out.
    """

    folder: Path
    images: Sequence[CocoImage]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    name: str
    skipped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        example = {key: value for key, value in image._asdict().items() if value is not None}
        content = (self.folder / image.file_name).read_bytes()
        return {**example, "id": np.int32(image.id), "image": content}

    def select(self, indices: Iterable[int], *, name: str | None = None) -> "CocoSource":
        """Returns a source of the images at ``indices``, in that order."""
        chosen = tuple(self.images[index] for index in indices)
        return dataclasses.replace(self, images=chosen, name=name or self.name)


def load_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    masks: bool = True,
    keep_empty: bool = False,
    max_boxes: int = 100,
) -> CocoSource:
    """Indexes a dataset in COCO's format: one annotation file and a folder of images.

    Boxes are clipped to the image. Entries that cannot be trained on are left out, and counted in
    ``skipped``: crowds, boxes that are empty after clipping, objects without a mask, and images
    without an object. Evaluation reads the annotation file itself, crowds included.

    Args:
        annotations: Annotation file, such as ``instances_train2017.json``.
        images: Folder that the annotation file's file names are relative to.
        masks: Whether to keep segmentations, and leave out objects without one. False suffices for
            boxes.
        keep_empty: Whether to keep images without an object, as evaluation needs.
        max_boxes: Maximum number of objects in an image, as many as `PadBoxes` has slots.

    Returns:
        A source whose labels are 1 to K, in the order of the category ids.

    Raises:
        FileNotFoundError: If the annotation file or an image file is missing.
        ValueError: If the annotation file is not in COCO's format, no image is kept, or an image
            has more than ``max_boxes`` objects; names the file.

    Example:
        >>> import json, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "cat.jpg").write_bytes(b"...")
        >>> box = {"id": 1, "image_id": 7, "category_id": 17, "bbox": [2, 3, 10, 9]}
        >>> content = {
        ...     "images": [{"id": 7, "file_name": "cat.jpg", "height": 8, "width": 16}],
        ...     "categories": [{"id": 17, "name": "cat"}],
        ...     "annotations": [box, {**box, "id": 2, "iscrowd": 1}],
        ... }
        >>> _ = (folder / "cats.json").write_text(json.dumps(content))
        >>> source = load_coco(folder / "cats.json", folder, masks=False)
        >>> source[0]["boxes"].tolist(), source[0]["labels"].tolist(), source.skipped
        ([[2.0, 3.0, 12.0, 8.0]], [1], {'crowds': 1})
    """
    annotations, folder = Path(annotations), Path(images)
    content = read_coco_file(annotations)
    labels, skipped = label_of_category(content), Counter()
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    found = [
        _index_image(image, objects[image["id"]], labels, masks=masks, skipped=skipped)
        for image in content["images"]
    ]
    kept = [image for image in found if keep_empty or len(image.boxes)]
    if not kept:
        raise ValueError(
            f"{annotations} must name at least one image{' with an object' * (not keep_empty)}, "
            f"received {len(found)} images; skipped: {dict(skipped) or 'nothing'}"
        )
    if len(kept) < len(found):
        skipped["images without an object"] = len(found) - len(kept)
    fullest = max(kept, key=lambda image: len(image.boxes))
    if len(fullest.boxes) > max_boxes:
        raise ValueError(
            f"{annotations}: images must have at most max_boxes={max_boxes} objects, received "
            f"{len(fullest.boxes)} for {fullest.file_name}; raise max_boxes and PadBoxes.slots"
        )
    _check_files(folder, [image.file_name for image in kept])
    names = {labels[category["id"]]: category["name"] for category in content["categories"]}
    return CocoSource(
        folder=folder,
        images=tuple(kept),
        class_names=("background", *(str(names[label]) for label in sorted(names))),
        category_ids=(0, *labels),
        name=annotations.stem,
        skipped=dict(skipped),
    )


def _index_image(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    labels: Mapping[int, int],
    *,
    masks: bool,
    skipped: Counter[str],
) -> CocoImage:
    """Returns an image with the objects that can be trained on; counts the others."""
    height, width = image["height"], image["width"]
    boxes, classes, segmentations = [], [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        x1, x2 = max(x, 0), min(x + w, width)
        y1, y2 = max(y, 0), min(y + h, height)
        if annotation["iscrowd"]:
            skipped["crowds"] += 1
        elif x2 <= x1 or y2 <= y1:
            skipped["empty boxes"] += 1
        elif masks and not annotation["segmentation"]:
            skipped["objects without a mask"] += 1
        else:
            boxes.append((x1, y1, x2, y2))
            classes.append(labels[annotation["category_id"]])
            segmentations.append(_compact(annotation["segmentation"]))
    return CocoImage(
        file_name=image["file_name"],
        id=image["id"],
        height=height,
        width=width,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(classes, np.int32),
        segmentations=tuple(segmentations) if masks else None,
    )


def _compact(segmentation: Any) -> Any:
    """Turns polygons into arrays, which take an eighth of the memory of Python's floats."""
    if isinstance(segmentation, dict):
        return segmentation
    return tuple(np.array(polygon, np.float32) for polygon in segmentation)


def _check_files(folder: Path, names: Sequence[str]) -> None:
    """Raises FileNotFoundError if a file is missing; lists folders, to spare a remote disk."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of images {folder}.")
    listed: dict[str, set[str]] = {}
    for parent in {os.path.dirname(name) for name in names}:
        inside = folder / parent
        listed[parent] = set(os.listdir(inside)) if inside.is_dir() else set()
    paths = [os.path.split(name) for name in names]
    missing = [folder / parent / name for parent, name in paths if name not in listed[parent]]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} image files are missing, such as "
            f"{missing[0]}; is it the folder of another split?"
        )
