"""Writes a detection dataset that needs no internet: `python -m experiments.scenes`.

Items of Fashion-MNIST, in many sizes and colors and partly hidden by each other, stand in front of
photographs that come with scikit-image. Each image has the boxes and the visible pixels of its
items, in COCO's format. Training and validation share neither items nor photographs.

The 9,500 images take about 30 seconds and 100 MB.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich

from experiments._command import make_main
from experiments._object_figures import AnnotatedImage, draw_annotated_images
from wsbcn_flax._extras import require
from wsbcn_flax.data import (
    DecodeAnnotatedImage,
    ImageSource,
    decode_rle,
    default_data_dir,
    encode_rle,
    load_coco,
    load_split,
)
from wsbcn_flax.training.progress import Progress

# Functions of skimage.data whose images are in its wheel.
PHOTOGRAPHS = {
    "train": ("astronaut", "coffee", "stereo_motorcycle", "rocket", "grass", "gravel", "brick"),
    "val": ("chelsea", "immunohistochemistry", "camera", "moon"),
}
_ITEMS = {"train": "train", "val": "test"}
_MOST_ITEMS = 5
_SMALLEST, _LARGEST = 0.2, 0.6  # sides of an item, as fractions of the image's side
_VISIBLE = 0.4  # fraction of its pixels that every item must show
_QUALITY = 95  # quality of the JPEG files


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesOptions:
    """Writes scenes of Fashion-MNIST items on photographs, in COCO's format.

    The folder gets `train/`, `val/`, `instances_train.json` and `instances_val.json`.

    Attributes:
        out: Folder to write to; `scenes` in the folder of datasets by default.
        train: Number of training images.
        val: Number of validation images.
        size: Side of the images, in pixels.
        seed: Seed of all random choices.
        figure: File for a figure of a few images; None draws none.
        data_dir: Folder of datasets; a folder in the user's cache by default.
    """

    out: Path = dataclasses.field(default_factory=lambda: default_data_dir() / "scenes")
    train: int = 9000
    val: int = 500
    size: int = 128
    seed: int = 0
    figure: Path | None = None
    data_dir: Path | None = None

    def __post_init__(self):
        if self.train < 1 or self.val < 1 or self.size < 32:
            raise ValueError(
                "train and val must be at least 1 and size at least 32 pixels, received "
                f"{self.train}, {self.val} and {self.size}."
            )
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, received {self.seed}.")


class Scene(NamedTuple):
    """An image and its items.

    Attributes:
        image: Pixels, uint8 ``[size, size, 3]``.
        masks: Visible pixels of each item, bool ``[n, size, size]``; no two overlap.
        labels: Class of each item from 0, ``[n]``.
    """

    image: np.ndarray
    masks: np.ndarray
    labels: list[int]


def _scenes(options: ScenesOptions) -> None:
    items: dict[str, Any] = {
        split: load_split("fashion", name, data_dir=options.data_dir)
        for split, name in _ITEMS.items()
    }
    counts = {"train": options.train, "val": options.val}
    objects, done = {}, itertools.count(1)
    with Progress("scenes", total=options.train + options.val) as progress:

        def shown(scenes: Iterator[Scene]) -> Iterator[Scene]:
            for scene in scenes:
                yield scene
                progress.update(next(done))

        for number, (split, count) in enumerate(counts.items()):
            photographs, seed = load_photographs(split), (options.seed, number)
            scenes = draw_scenes(
                items[split], photographs, count=count, size=options.size, seed=seed
            )
            names = items[split].class_names
            objects[split] = write_split(options.out, split, shown(scenes), class_names=names)
    if options.figure is not None:
        draw_figure(options.out, options.figure)
    rich.print(f"{options.out}:")
    for split, images in (("train", options.train), ("val", options.val)):
        rich.print(f"  {split}: {images:,} images with {objects[split]:,} items")


def load_photographs(split: str) -> list[np.ndarray]:
    """Returns the photographs of a split, uint8 ``[H, W, 3]``.

    Raises:
        ImportError: If scikit-image is not installed; names the extra.
    """
    data = require("skimage.data", extra="scenes")
    photographs = []
    for name in PHOTOGRAPHS[split]:
        photograph = getattr(data, name)()
        if isinstance(photograph, tuple):  # a stereo pair
            photograph = photograph[0]
        if photograph.ndim == 2:
            photograph = np.repeat(photograph[..., np.newaxis], 3, axis=-1)
        photographs.append(photograph)
    return photographs


def draw_scenes(
    items: ImageSource,
    photographs: Sequence[np.ndarray],
    *,
    count: int,
    size: int,
    seed: Sequence[int],
) -> Iterator[Scene]:
    """Draws scenes, each with a random generator of its own."""
    for index in range(count):
        rng = np.random.default_rng((*seed, index))
        background = _background(photographs[int(rng.integers(len(photographs)))], size, rng)
        yield draw_scene(items, background, rng)


def draw_scene(items: ImageSource, background: np.ndarray, rng: np.random.Generator) -> Scene:
    """Draws one to five items on a background, float32 ``[size, size, 3]`` from 0 to 1."""
    image, size = background.copy(), len(background)
    owner = np.zeros((size, size), int)  # which item, counted from 1, each pixel shows
    labels: list[int] = []
    full_areas: list[int] = []
    for _ in range(rng.integers(1, _MOST_ITEMS + 1)):
        index = int(rng.integers(len(items)))
        side = round(size * rng.uniform(_SMALLEST, _LARGEST))
        pixels, alpha = _cut_out(items.images[index, ..., 0], side, rng)
        top, left = rng.integers(-side // 8, size - side + side // 8 + 1, size=2)
        pixels, alpha = (_place(each, top, left, size) for each in (pixels, alpha))
        covers = alpha > 0.5
        changed = np.where(covers, len(labels) + 1, owner)
        full = [*full_areas, int(covers.sum())]
        visible = np.bincount(changed.ravel(), minlength=len(full) + 1)[1:]
        if (visible <= _VISIBLE * np.array(full)).any():
            continue  # An item would be too hidden, so the scene has one item fewer.
        image += alpha[..., np.newaxis] * (pixels - image)
        owner, full_areas = changed, full
        labels.append(int(items.labels[index]))
    masks = owner == np.arange(1, len(labels) + 1)[:, np.newaxis, np.newaxis]
    return Scene((255 * image).round().astype(np.uint8), masks, labels)


def write_split(
    out: Path, split: str, scenes: Iterable[Scene], *, class_names: Sequence[str]
) -> int:
    """Writes the images and then the annotation file; returns the number of items."""
    cv2 = require("cv2", extra="jpeg")
    (out / split).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, start=1):
        height, width, _ = scene.image.shape
        name = f"{number:06d}.jpg"
        options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
        _, content = cv2.imencode(".jpg", scene.image[..., ::-1], options)
        (out / split / name).write_bytes(content.tobytes())
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            annotation = _annotate(mask) | {"image_id": number, "category_id": label + 1}
            annotations.append(annotation | {"id": len(annotations) + 1})
    content = {
        "info": {"description": "Fashion-MNIST items before photographs of scikit-image"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names, start=1)],
    }
    (out / f"instances_{split}.json").write_text(json.dumps(content))
    return len(annotations)


def draw_figure(folder: Path, path: Path, *, count: int = 4) -> None:
    """Draws the first images of both splits, as the library reads them back."""
    annotated = []
    for split in PHOTOGRAPHS:
        source = load_coco(folder / f"instances_{split}.json", folder / split)
        for index in range(min(count, len(source))):
            example: Mapping[str, Any] = DecodeAnnotatedImage().map(source[index])
            annotated.append(
                AnnotatedImage(
                    image=example["image"],
                    boxes=example["boxes"],
                    masks=np.array([decode_rle(each) for each in example["segmentations"]]),
                    labels=example["labels"],
                    texts=[source.class_names[label] for label in example["labels"]],
                    title=f"{split}/{source[index]['file_name']}",
                )
            )
    draw_annotated_images(annotated, path, columns=count)


def _background(photograph: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a square of a photograph, lighter or darker, float32 ``[size, size, 3]``."""
    cv2 = require("cv2", extra="jpeg")
    height, width, _ = photograph.shape
    side = int(rng.integers(min(size, height, width), min(height, width), endpoint=True))
    top, left = rng.integers(0, (height - side, width - side), endpoint=True)
    square = photograph[top : top + side, left : left + side]
    resized = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)
    lighter = resized.astype(np.float32) / 255 * np.float32(rng.uniform(0.5, 1.1))
    return np.minimum(lighter[:, :: rng.choice((1, -1))], 1)


def _cut_out(
    item: np.ndarray, side: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a tinted item, float32 ``[side, side, 3]``, and its opacity ``[side, side]``."""
    cv2 = require("cv2", extra="jpeg")
    # Fills the outline without its faint fringe, since dark cloth is part of the item.
    outlines, _ = cv2.findContours(
        (item > 12).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    outline = cv2.drawContours(np.zeros((28, 28), np.float32), outlines, -1, 1.0, cv2.FILLED)
    grey, soft = (
        cv2.resize(each, (side, side), interpolation=cv2.INTER_LINEAR)
        for each in (item.astype(np.float32) / 255, cv2.GaussianBlur(outline, (3, 3), 0))
    )
    tint = rng.uniform(0.2, 1, 3)
    tint /= tint.max()
    shade = (0.15 + 0.85 * np.clip(grey, 0, 1)) * rng.uniform(0.7, 1)
    return (shade[..., np.newaxis] * tint).astype(np.float32), np.clip(2 * soft - 0.5, 0, 1)


def _place(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """Places pixels in zeros ``[size, size, ...]``, cut off at the edges."""
    side = len(pixels)
    canvas = np.zeros((size + 2 * side, size + 2 * side, *pixels.shape[2:]), pixels.dtype)
    canvas[top + side : top + 2 * side, left + side : left + 2 * side] = pixels
    return canvas[side : side + size, side : side + size]


def _annotate(mask: np.ndarray) -> dict[str, Any]:
    """Returns the box, the area and the mask of an item in COCO's format."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": encode_rle(mask),
    }


main = make_main(_scenes, options=ScenesOptions)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
