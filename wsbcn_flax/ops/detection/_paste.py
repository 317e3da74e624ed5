"""Predicted masks in the image, on the host."""

import numpy as np


def paste_mask(
    mask: np.ndarray,
    box: np.ndarray,
    image_hw: tuple[int, int],
    *,
    threshold: float = 0.5,
) -> np.ndarray:
    """Resizes a mask to its box and pastes it into an empty image, in NumPy.

    The mask is padded by one pixel of zeros and the box grows in proportion, so that edges are
    interpolated. The grown corners are cut off to whole pixels, of which the last counts. The
    authors' code and torchvision agree in this. Only pixels inside box and image are computed.

    Args:
        mask: Probabilities [M, M].
        box: [4], xyxy in pixels of the image.
        image_hw: Height and width of the image in pixels.
        threshold: Probability above which a pixel belongs to the mask.

    Returns:
        Flags [H, W].

    Raises:
        ValueError: If a shape is wrong.

    Example:
        >>> import numpy as np
        >>> from wsbcn_flax.ops.detection import paste_mask
        >>> pasted = paste_mask(np.ones((28, 28)), np.array([1.5, 1.5, 4.4, 2.5]), (4, 6))
        >>> print(pasted.astype(int))
        [[0 0 0 0 0 0]
         [0 1 1 1 1 0]
         [0 1 1 1 1 0]
         [0 0 0 0 0 0]]
    """
    mask, box = np.asarray(mask, np.float32), np.asarray(box, np.float32)
    side = len(mask)
    if mask.shape != (side, side) or box.shape != (4,):
        raise ValueError(
            f"mask must have shape [M, M] and box [4], received {mask.shape} and {box.shape}."
        )
    center, half = (box[2:] + box[:2]) * np.float32(0.5), (box[2:] - box[:2]) * np.float32(0.5)
    half = half * np.float32((side + 2) / side)
    # Truncated towards zero, as both references do.
    first, last = (center - half).astype(np.int64), (center + half).astype(np.int64)
    (left, right), (top, bottom) = (
        (max(low, 0), min(high + 1, pixels))
        for low, high, pixels in zip(first, last, image_hw[::-1], strict=True)
    )
    pasted = np.zeros(image_hw, bool)
    if left < right and top < bottom:
        width, height = np.maximum(last - first + 1, 1)
        rows = _weights(np.arange(top, bottom) - first[1], height, side + 2)
        columns = _weights(np.arange(left, right) - first[0], width, side + 2)
        pasted[top:bottom, left:right] = rows @ np.pad(mask, 1) @ columns.T > threshold
    return pasted


def _weights(pixels, count, side):
    """Weights [P, side] of bilinear interpolation from ``side`` pixels to ``count``."""
    source = np.maximum((pixels + 0.5) * (side / count) - 0.5, 0)
    distance = np.minimum(source, side - 1)[:, None] - np.arange(side)
    return np.maximum(1 - np.abs(distance), 0).astype(np.float32)
