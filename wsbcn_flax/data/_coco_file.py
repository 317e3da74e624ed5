"""Reads annotation files in COCO's format and reports errors in them."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def read_coco_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads an annotation file and checks what every user of it relies on.

    Ids must be unique 32-bit integers, references must lead to an entry, boxes must be four finite
    numbers, and images must have a size. Annotations may lack "area" (which becomes the box's
    area), "iscrowd" (0) and "segmentation" ([]). Polygons of fewer than three points are dropped.
    The format is described at https://cocodataset.org/#format-data.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a rule above is broken; names the file and the entry.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, received a file that is not: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, received a {type(content).__name__}")
    content = {"info": {}, "annotations": [], **content}  # COCO's test sets have no annotations.
    for name, fields in _FIELDS.items():
        _check_entries(path, name, content.get(name), fields)
    sizes = {image["id"]: _size(path, image) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        try:
            _complete(annotation, sizes, categories)
        except ValueError as error:
            raise ValueError(f"{path}: annotation {annotation['id']}: {error}") from error
    return content


def label_of_category(content: Mapping[str, Any]) -> dict[int, int]:
    """Returns labels from 1 to K by category id, in the order of the ids; 0 is the background."""
    ids = sorted(category["id"] for category in content["categories"])
    return {category: label for label, category in enumerate(ids, start=1)}


def _check_entries(path: Path, name: str, entries: Any, fields: tuple[str, ...]) -> None:
    """Checks that entries have all their fields, and unique ids."""
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list {name!r}, received {type(entries).__name__}")
    for position, entry in enumerate(entries):
        found = entry if isinstance(entry, dict) else {}
        if absent := [field for field in fields if field not in found]:
            raise ValueError(
                f"{path}: entry {position} of {name!r} must be an object with "
                f"{', '.join(fields)}; received one without {', '.join(absent)}"
            )
        # A batch carries ids as int32.
        if not isinstance(entry["id"], int) or not 0 <= entry["id"] < 2**31:
            raise ValueError(
                f"{path}: ids in {name!r} must be integers from 0 to 2**31 - 1, received "
                f"{entry['id']!r}; number the entries"
            )
    twice = [each for each, count in Counter(e["id"] for e in entries).items() if count > 1]
    if twice:
        raise ValueError(
            f"{path}: ids in {name!r} must be unique, received {len(twice)} more than once, such "
            f"as {twice[0]}; were two files joined?"
        )


def _size(path: Path, image: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the height and width of an image."""
    name, height, width = image["file_name"], image["height"], image["width"]
    if not isinstance(name, str) or not all(isinstance(x, int) and x > 0 for x in (height, width)):
        raise ValueError(
            f"{path}: an image must have a file_name and a positive integer height and width, "
            f"received {name!r}, {height!r} and {width!r}"
        )
    return height, width


def _complete(annotation: dict[str, Any], sizes: Mapping[int, Any], categories: set[int]) -> None:
    """Checks an annotation and adds the fields that may be left out."""
    if annotation["image_id"] not in sizes:
        raise ValueError(f"image_id must be in 'images', received {annotation['image_id']!r}")
    if annotation["category_id"] not in categories:
        raise ValueError(
            f"category_id must be in 'categories', received {annotation['category_id']!r}"
        )
    box = annotation["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and _are_finite(box)):
        raise ValueError(f"bbox must be [x, y, width, height] in pixels, received {box!r}")
    annotation.setdefault("iscrowd", 0)
    annotation.setdefault("area", box[2] * box[3])
    found = annotation.get("segmentation") or []
    if isinstance(found, dict):
        height, width = sizes[annotation["image_id"]]
        counts = found.get("counts")
        whole = sum(counts) == height * width if isinstance(counts, list) else bool(counts)
        if found.get("size") != [height, width] or not whole:
            raise ValueError(
                f"an RLE must have the size {[height, width]} of its image and counts for all its "
                f"pixels, received size {found.get('size')} and counts {counts!r:.40}"
            )
    elif not isinstance(found, list) or not all(map(_is_polygon, found)):
        raise ValueError(
            "segmentation must be a list of polygons [x1, y1, x2, y2, ...] or an RLE object, "
            f"received {found!r:.80}"
        )
    else:
        found = [polygon for polygon in found if len(polygon) >= 6]
    annotation["segmentation"] = found


def _is_polygon(value: Any) -> bool:
    return isinstance(value, list) and len(value) % 2 == 0 and _are_finite(value)


def _are_finite(values: list[Any]) -> bool:
    try:
        return all(map(math.isfinite, values))
    except (TypeError, OverflowError):
        return False
