"""Small datasets in COCO's format: a file, a folder, and objects drawn in the images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from encoded_images import encode, smooth_image

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 17, "name": "triangle"}, {"id": 90, "name": "L"}]


def polygon(kind: int, x: float, y: float, w: float, h: float) -> list[list[float]]:
    """Returns the polygons of an object of category ``kind`` that extends over its whole box."""
    return {
        3: [[x, y, x + w, y, x + w, y + h, x, y + h]],
        17: [[x, y, x + w, y + h, x, y + h]],
        90: [
            [x, y, x + w / 2, y, x + w / 2, y + h, x, y + h],
            [x + w / 2, y + h / 2, x + w, y + h / 2, x + w, y + h, x + w / 2, y + h],
        ],
    }[kind]


def coco_content(count: int = 6, *, seed: int = 0, sizes: Any = ((40, 60), (60, 40))) -> dict:
    """Makes an annotation file with 1 to 3 objects on each image; image 10 + i has ``sizes[i]``."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        image = {"id": 10 + index, "file_name": f"{index}.png", "height": height, "width": width}
        images.append(image)
        for _ in range(1 + index % 3):
            w, h = rng.integers(14, 30, 2)
            x, y = rng.integers(0, width - w), rng.integers(0, height - h)
            category = int(rng.choice([3, 17, 90]))
            segmentation = polygon(category, *map(float, (x, y, w, h)))
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h),
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
    return {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}


def write_coco(folder: Path, content: dict) -> Path:
    """Writes the file, and an image for each entry with a file name; returns the file's path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(content["images"]):
        pixels = smooth_image(image["height"], image["width"], seed=index)
        (folder / "images" / image["file_name"]).write_bytes(encode(pixels))
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return file
