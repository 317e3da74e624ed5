"""Anchors of a feature pyramid, as constants."""

from collections.abc import Sequence

import numpy as np

from wsbcn_flax.ops.detection._conventions import TORCHVISION, BoxConvention


def pyramid_anchors(
    level_hw: Sequence[tuple[int, int]],
    *,
    strides: Sequence[int] = (4, 8, 16, 32, 64),
    sizes: Sequence[float] = (32, 64, 128, 256, 512),
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    convention: BoxConvention = TORCHVISION,
) -> tuple[np.ndarray, ...]:
    """Lists the anchors of every level of a pyramid, in NumPy.

    The anchors of a position have areas near size^2 and the given ratios of height to width. Rows
    run over y, then x, then ratios, as a head's output [H, W, ratios] flattens.

    Args:
        level_hw: Height and width of every level's feature map.
        strides: Pixels of the image for one position, for every level.
        sizes: Side of the square anchor in pixels, for every level.
        ratios: Ratios of an anchor's height to its width.
        convention: Convention of centers and rounding.

    Returns:
        Anchors of every level, [H * W * ratios, 4], xyxy in pixels, float32.

    Raises:
        ValueError: If the numbers of levels differ.

    Example:
        >>> from wsbcn_flax.ops.detection import AUTHORS, pyramid_anchors
        >>> (anchors,) = pyramid_anchors([(1, 2)], strides=(4,), sizes=(32,), convention=AUTHORS)
        >>> anchors.shape, anchors[0].tolist()
        ((6, 4), [-22.0, -10.0, 25.0, 13.0])
    """
    if not len(level_hw) == len(strides) == len(sizes):
        raise ValueError(
            "level_hw, strides and sizes must have one entry for each level, received "
            f"{len(level_hw)}, {len(strides)} and {len(sizes)}."
        )
    levels = []
    for (height, width), stride, size in zip(level_hw, strides, sizes, strict=True):
        base = _base_anchors(stride, size, np.asarray(ratios, np.float64), convention)
        x, y = np.arange(width) * stride, np.arange(height) * stride
        shift = np.stack([*np.meshgrid(x, y)] * 2, -1)
        anchors = shift[:, :, None, :] + base
        levels.append(anchors.reshape(-1, 4).astype(np.float32))
    return tuple(levels)


def _base_anchors(stride, size, ratios, convention) -> np.ndarray:
    """Returns the anchors [ratios, 4] of the first position."""
    if convention.anchor_rounding == "at_stride":
        width = np.round(np.sqrt(stride**2 / ratios))
        sides = np.stack([width, np.round(width * ratios)], -1) * (size / stride)
        half, center = (sides - 1) / 2, (stride - 1) / 2
        return np.concatenate([center - half, center + half], -1)
    root = np.sqrt(ratios)
    half = size * np.stack([1 / root, root], -1) / 2
    return np.round(np.concatenate([-half, half], -1))
