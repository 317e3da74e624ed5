"""Pad-and-crop and horizontal flip, of a whole batch at once."""

import dataclasses

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Random crops of the zero-padded image, and random left-right flips.

    Drawing is apart from applying so that a host can draw for the whole global batch and touch the
    pixels of its own rows only.

    Attributes:
        crop_padding: pixels of black (0) added to each side before a crop of the original size
            is taken; 0 crops nothing.
        horizontal_flip: mirror each image left to right with probability 1/2. Wrong for digits
            and letters.

    Raises:
        ValueError: if ``crop_padding`` is negative.

    Example:
        >>> import numpy as np
        >>> images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
        >>> augmented = Augment(crop_padding=1)(images, np.random.default_rng(0))
        >>> augmented.shape, augmented.dtype
        ((2, 4, 4, 1), dtype('uint8'))
    """

    crop_padding: int = 4
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(
                f"crop_padding must be a number of pixels >= 0, got {self.crop_padding}"
            )

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws the random choices for ``count`` images.

        Args:
            rng: source of randomness.
            count: number of images.

        Returns:
            int64 ``[count, 3]``: first row and first column of the crop in the padded image, both
            in ``[0, 2 * crop_padding]``, and 1 to flip or 0 not to.
        """
        corners = rng.integers(0, 2 * self.crop_padding, size=(count, 2), endpoint=True)
        flips = rng.integers(0, int(self.horizontal_flip), size=(count, 1), endpoint=True)
        return np.concatenate([corners, flips], axis=1)

    def apply(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Applies choices made by `draw`.

        Args:
            images: ``[N, height, width, channels]``, any dtype.
            draws: int ``[N, 3]``, as `draw` returns them.

        Returns:
            A new array with the shape and dtype of ``images``.
        """
        _, height, width, _ = images.shape
        pad = (self.crop_padding, self.crop_padding)
        padded = np.pad(images, ((0, 0), pad, pad, (0, 0)))
        # A view [N, top, left, height, width, channels] of every possible crop: indexing it copies
        # whole crops, an order of magnitude faster than gathering pixel by pixel.
        crops = sliding_window_view(padded, (height, width), axis=(1, 2)).transpose(
            0, 1, 2, 4, 5, 3
        )
        top, left, flip = draws.T
        cropped = crops[np.arange(len(images)), top, left]
        flipped = np.flatnonzero(flip)
        cropped[flipped] = cropped[flipped, :, ::-1]
        return cropped

    def __call__(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws for every image of the batch and applies the draws."""
        return self.apply(images, self.draw(rng, len(images)))
