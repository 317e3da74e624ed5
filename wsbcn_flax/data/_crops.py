"""Crops of decoded images to one size: at random for training, central for evaluation."""

import dataclasses
from typing import NamedTuple

import numpy as np

from wsbcn_flax.data._decode import decode_rgb, resize


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """The part of ``[H, W, channels]`` inside, as a view."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def _central_box(height: int, width: int, *, of: tuple[int, int]) -> Box:
    """A box in the middle of an image of ``of = (height, width)``, rounded as torchvision does."""
    return Box(round((of[0] - height) / 2), round((of[1] - width) / 2), height, width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """The crops that ImageNet networks train on, and random left-right flips.

    A crop takes a share of the image's area uniform in ``area`` and a ratio of width to height
    log-uniform in ``ratio``, anywhere in the image, and is resized to a square. If it does not fit
    into the image it is drawn again; after ten times the largest central crop with a ratio in
    ``ratio`` is taken. As torchvision's RandomResizedCrop; Szegedy et al., "Going Deeper with
    Convolutions", section 6 (https://arxiv.org/abs/1409.4842).

    As with `Augment`, drawing is apart from applying.

    Attributes:
        image_size: side of the square.
        area: smallest and largest share.
        ratio: smallest and largest ratio.

    Raises:
        ValueError: if ``image_size`` is not positive.
    """

    image_size: int
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    ATTEMPTS = 10

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draws the random choices for ``count`` images of unknown size.

        Returns:
            float64 ``[count, 23]``: ten shares of the area, ten logarithms of ratios, how far down
            and how far right in ``[0, 1)``, and less than 1/2 to flip.
        """
        shape = (count, self.ATTEMPTS)
        lowest, highest = np.log(self.ratio)
        shares = rng.uniform(*self.area, size=shape)
        log_ratios = rng.uniform(lowest, highest, size=shape)
        return np.concatenate([shares, log_ratios, rng.random((count, 3))], axis=1)

    def box(self, draw: np.ndarray, height: int, width: int) -> Box:
        """The crop that one image's draw means for an image of this size."""
        shares, log_ratios, (down, right, _) = np.split(draw, [self.ATTEMPTS, 2 * self.ATTEMPTS])
        areas, ratios = height * width * shares, np.exp(log_ratios)
        heights, widths = np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))
        fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
        if not fits.any():
            return self._largest_central_box(height, width)
        first = np.argmax(fits)
        h, w = int(heights[first]), int(widths[first])
        return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)

    def _largest_central_box(self, height: int, width: int) -> Box:
        low, high = self.ratio
        h, w = min(height, round(width / low)), min(width, round(height * high))
        return _central_box(h, w, of=(height, width))

    def apply(self, pixels: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Crops, resizes and flips one image.

        Args:
            pixels: uint8 ``[height, width, 3]``.
            draw: one row of what `draw` returns.

        Returns:
            uint8 ``[image_size, image_size, 3]``.
        """
        box = self.box(draw, *pixels.shape[:2])
        crop = resize(box.cut(pixels), self.image_size, self.image_size)
        return crop[:, ::-1] if draw[-1] < 0.5 else crop


@dataclasses.dataclass(frozen=True, kw_only=True)
class CentralCrop:
    """The crop that ImageNet networks are evaluated on.

    The shorter side is resized to ``resize``, the longer in proportion (rounded down), and the
    central square of ``image_size`` taken.

    Attributes:
        image_size: side of the square.
        resize: shorter side of the resized image.

    Raises:
        ValueError: unless ``1 <= image_size <= resize``.
    """

    image_size: int
    resize: int

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        if self.resize < self.image_size:
            raise ValueError(
                f"resize must be at least image_size={self.image_size}, or the crop would leave "
                f"the image; received {self.resize}"
            )

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Resizes and crops uint8 ``[height, width, 3]`` to ``[image_size, image_size, 3]``."""
        shorter = min(pixels.shape[:2])
        height, width = (side * self.resize // shorter for side in pixels.shape[:2])
        box = _central_box(self.image_size, self.image_size, of=(height, width))
        return box.cut(resize(pixels, height, width))


def eval_crop(
    content: bytes, *, image_size: int = 224, resize: int = 256, name: str = "the image"
) -> np.ndarray:
    """Decodes one image file and crops it exactly as `encoded_eval_batches` does.

    What a batch holds is ``(crop / 255 - mean) / std`` of it.

    Args:
        content: of a JPEG or PNG file.
        image_size: side of the central crop.
        resize: shorter side of the image before the crop.
        name: of the image, for the error.

    Returns:
        uint8 ``[image_size, image_size, 3]``, red first.

    Raises:
        ValueError: if the content is no image, or not a whole one, or ``image_size`` exceeds
            ``resize``.
        ImportError: if OpenCV is not installed; names the extra.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (500, 375), "red").save(file, "PNG")
        >>> crop = eval_crop(file.getvalue())
        >>> crop.shape, crop[0, 0].tolist()
        ((224, 224, 3), [255, 0, 0])
    """
    crop = CentralCrop(image_size=image_size, resize=resize)
    return crop.apply(decode_rgb(content, name=name))


def _check_image_size(image_size: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size must be a positive number of pixels, received {image_size}")
