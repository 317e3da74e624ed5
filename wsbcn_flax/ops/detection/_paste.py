"""Pasting of predicted masks into the image, on the host."""

import math

import numpy as np


def paste_mask(
    mask: np.ndarray,
    box: np.ndarray,
    image_hw: tuple[int, int],
    *,
    threshold: float = 0.5,
    rounded: bool = True,
) -> np.ndarray:
    """Resizes a mask to its box and pastes it into an empty image, in NumPy.

    The mask, with zeros around it, is interpolated bilinearly. Only pixels that the box, grown by a
    cell of the mask, reaches in the image are computed.

    Args:
        mask: Probabilities [M, M].
        box: Box [4], xyxy in pixels of the image.
        image_hw: Height and width of the image in pixels.
        threshold: Probability above which a pixel belongs to the mask.
        rounded: Whether the box, grown by a cell of the mask, is cut off to whole pixels, including
            the last one. The authors' code and torchvision do this, which shifts edges by up to one
            pixel. Otherwise the mask is interpolated at the centres of the pixels, which is
            detectron2's correction.

    Returns:
        Flags [H, W].

    Raises:
        ValueError: If a shape is wrong.

    Example:
        >>> import numpy as np
        >>> from wsbcn_flax.ops.detection import paste_mask
        >>> box = np.array([1.5, 1.5, 4.4, 2.5])
        >>> print(paste_mask(np.ones((28, 28)), box, (4, 6)).astype(int))
        [[0 0 0 0 0 0]
         [0 1 1 1 1 0]
         [0 1 1 1 1 0]
         [0 0 0 0 0 0]]
        >>> print(paste_mask(np.ones((2, 2)), np.array([1, 0, 3, 2]), (2, 4), rounded=False) + 0)
        [[0 1 1 0]
         [0 1 1 0]]
    """
    mask, box = np.asarray(mask, np.float32), np.asarray(box, np.float32)
    side = len(mask)
    if mask.shape != (side, side) or box.shape != (4,):
        raise ValueError(
            f"mask must have shape [M, M] and box [4], received {mask.shape} and {box.shape}."
        )
    interpolate = _in_whole_pixels if rounded else _at_centres
    pasted = np.zeros(image_hw, bool)
    columns, across = interpolate(box[0], box[2], cells=side, pixels=image_hw[1])
    rows, down = interpolate(box[1], box[3], cells=side, pixels=image_hw[0])
    pasted[rows, columns] = down @ mask @ across.T > threshold
    return pasted


def _in_whole_pixels(low, high, *, cells: int, pixels: int) -> tuple[slice, np.ndarray]:
    """Returns the pixels that a box reaches, and the weights of a mask's cells in each pixel."""
    center, half = (high + low) * np.float32(0.5), (high - low) * np.float32(0.5)
    half = half * np.float32((cells + 2) / cells)
    # Truncate towards zero, as both references do.
    first, last = int(center - half), int(center + half)
    reached = range(pixels)[max(first, 0) : max(last + 1, 0)]
    source = (np.array(reached) - first + 0.5) * ((cells + 2) / max(last - first + 1, 1)) - 0.5
    source = np.clip(source, 0, cells + 1)
    weights = np.maximum(1 - np.abs(source[:, None] - np.arange(1, cells + 1)), 0)
    return slice(reached.start, reached.stop), weights.astype(np.float32)


def _at_centres(low, high, *, cells: int, pixels: int) -> tuple[slice, np.ndarray]:
    """Returns the same as ``_in_whole_pixels``, to interpolate at the centres of pixels."""
    cell = max(float(high - low), 1e-6) / cells
    start, stop = math.floor(low - cell), math.ceil(high + cell)
    reached = range(pixels)[max(start, 0) : max(stop, 0)]
    centres = (np.array(reached, np.float64) + 0.5 - low) / cell - 0.5
    weights = np.maximum(0, 1 - abs(centres[:, None] - np.arange(cells)))
    return slice(reached.start, reached.stop), weights
