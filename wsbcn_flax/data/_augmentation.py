"""Random transforms of images: crops and flips."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from wsbcn_flax.data._decoding import import_cv2, resize


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A transform that crops the zero-padded image at random, to its original size.

    It transforms an example (``[H, W, C]``) or, several times as fast, a batch (``[N, H, W, C]``).

    Attributes:
        padding: Width of the black (0) border to add, in pixels; 0 crops nothing.

    Raises:
        ValueError: If ``padding`` is negative.

    Example:
        >>> import numpy as np
        >>> batch = {"image": np.ones((2, 4, 4, 1), np.uint8)}
        >>> RandomCrop(padding=1).random_map(batch, np.random.default_rng(0))["image"].shape
        (2, 4, 4, 1)
    """

    padding: int = 4

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be a number of pixels >= 0, received {self.padding}")

    def random_map(self, element: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Crops ``element["image"]``."""
        image = element["image"]
        *leading, height, width, channels = image.shape
        corners = rng.integers(0, 2 * self.padding, size=(*leading, 2), endpoint=True)
        top, left = corners.reshape(-1, 2).T
        pad = (self.padding, self.padding)
        padded = np.pad(image.reshape(-1, height, width, channels), ((0, 0), pad, pad, (0, 0)))
        # A view [N, top, left, H, W, C] of every possible crop. Indexing it copies whole crops, an
        # order of magnitude faster than gathering pixel by pixel.
        crops = np.moveaxis(sliding_window_view(padded, (height, width), axis=(1, 2)), 3, -1)
        return {**element, "image": crops[np.arange(len(top)), top, left].reshape(image.shape)}


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """A transform that mirrors images left-right with probability 1/2.

    It transforms an example (with OpenCV) or a batch. Do not use it for digits or letters.
    """

    def random_map(self, element: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Flips ``element["image"]``, ``[H, W, C]`` or ``[N, H, W, C]``."""
        image = element["image"]
        *leading, channels = image.shape
        flips = rng.integers(0, 2, size=leading[:-2]).astype(bool)
        if not flips.any():
            return dict(element)
        if image.ndim == 3:  # OpenCV takes a tenth of numpy's time.
            return {**element, "image": import_cv2().flip(image, 1).reshape(image.shape)}
        # Whole pixels move faster than bytes.
        pixels = np.ascontiguousarray(image).view(f"V{channels * image.itemsize}")[..., 0]
        flipped = np.ascontiguousarray(pixels[..., ::-1])
        flipped[~flips] = pixels[~flips]
        return {**element, "image": flipped.view(image.dtype).reshape(image.shape)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A transform for ImageNet that resizes a random crop to a square, as torchvision does.

    The crop's share of the image's area is uniform in ``area``, and its ratio of width to height is
    log-uniform in ``ratio``. A crop that does not fit is drawn again. After ten attempts, the
    largest central crop with a ratio in that range is taken.
    Reference: Szegedy et al., section 6 (https://arxiv.org/abs/1409.4842).

    Attributes:
        image_size: Side of the square, in pixels.
        area: Smallest and largest share of the area.
        ratio: Smallest and largest ratio of width to height.

    Raises:
        ValueError: If ``image_size`` is not positive.
    """

    image_size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be a positive number, received {self.image_size}")

    def random_map(self, element: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Crops ``element["image"]``, uint8 ``[H, W, 3]``, to ``[image_size, image_size, 3]``."""
        image = element["image"]
        top, left, h, w = self.box(image.shape[0], image.shape[1], rng)
        crop = resize(image[top : top + h, left : left + w], self.image_size, self.image_size)
        return {**element, "image": crop}

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draws the top, left, height and width of a crop of an image of this size."""
        low, high = self.ratio
        for _ in range(10):
            area = height * width * rng.uniform(*self.area)
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 1 <= h <= height and 1 <= w <= width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                return int(top), int(left), h, w
        h, w = min(height, round(width / low)), min(width, round(height * high))
        return round((height - h) / 2), round((width - w) / 2), h, w
