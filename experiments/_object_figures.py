"""Figures of images with boxes, masks and labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsbcn_flax._extras import require


class AnnotatedImage(NamedTuple):
    """An image with its objects.

    Attributes:
        image: Pixels, uint8 ``[H, W, 3]``.
        boxes: Corners ``x1, y1, x2, y2`` in pixels, ``[n, 4]``.
        masks: Mask of each object, ``[n, H, W]``; None to draw boxes only.
        labels: Classes, which determine the colors, ``[n]``.
        texts: Caption of each object.
        title: Title above the image.
    """

    image: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None
    labels: np.ndarray
    texts: Sequence[str]
    title: str = ""


def draw_annotated_images(
    images: Sequence[AnnotatedImage], path: Path, *, columns: int = 4
) -> None:
    """Draws images side by side, each object in the color of its class."""
    figures = require("matplotlib.figure", extra="plots")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = figures.Figure(figsize=(3 * columns, 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, annotated in zip(grid.flat, images, strict=False):
        _draw(axes, annotated)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, annotated: AnnotatedImage) -> None:
    from matplotlib.colors import hsv_to_rgb
    from matplotlib.patches import Rectangle

    height, width, _ = annotated.image.shape
    axes.set_title(annotated.title, fontsize=8)
    axes.imshow(annotated.image, extent=(0, width, height, 0))
    centres = np.arange(width) + 0.5, np.arange(height) + 0.5
    for index, (box, label, text) in enumerate(
        zip(annotated.boxes, annotated.labels, annotated.texts, strict=True)
    ):
        # Steps of the golden ratio keep the hues of neighbouring classes far apart.
        color = hsv_to_rgb((0.618 * label % 1, 0.9, 0.85))
        x1, y1, x2, y2 = box
        if annotated.masks is not None:
            mask = annotated.masks[index].astype(float)
            overlay = np.broadcast_to((*color, 0), (height, width, 4)).copy()
            overlay[..., 3] = 0.25 * mask
            axes.imshow(overlay, extent=(0, width, height, 0), interpolation="nearest")
            if 0 < mask.mean() < 1:
                axes.contour(*centres, mask, levels=[0.5], colors=[color], linewidths=1.2)
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color))
        background = {"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        # Above the box, or inside it where there is no room.
        inside = y1 < height / 16
        axes.text(
            x1,
            y1,
            text,
            fontsize=6,
            color="white",
            bbox=background,
            verticalalignment="top" if inside else "bottom",
            clip_on=True,
        )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
