"""Decodes and resizes images with OpenCV."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from wsbcn_flax._extras import require
from wsbcn_flax.data._sources import file_name

_PNG = b"\x89PNG\r\n\x1a\n"
MOST_PIXELS = 2**26  # Maximum number of pixels; larger images are refused before decoding.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeImage:
    """A transform that decodes the image file in an example to 8-bit red, green and blue.

    It decodes every format that OpenCV supports. Grey becomes three equal channels, 16 bits are
    scaled to 8, and transparent pixels are laid on white. The image is rotated by its orientation
    tag. Error messages use an entry ``"file_name"``, which is then dropped.

    Attributes:
        upright: Whether to rotate the image by its orientation tag; annotations may not expect it.

    Raises:
        ImportError: While mapping, if OpenCV is not installed; names the extra.
        ValueError: While mapping, if the content is not a complete image or has more than 67
            million pixels.

    Example:
        One image file, prepared exactly as for evaluation:

        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (500, 375), "red").save(file, "PNG")
        >>> example = {"image": file.getvalue(), "file_name": "red.png"}
        >>> for transform in (DecodeImage(), CentralCrop()):
        ...     example = transform.map(example)
        >>> example["image"].shape, example["image"][0, 0].tolist()
        ((224, 224, 3), [255, 0, 0])
    """

    upright: bool = True

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes the bytes ``element["image"]`` to RGB, uint8 ``[H, W, 3]``."""
        cv2 = import_cv2()
        content = element["image"]
        flags = cv2.IMREAD_COLOR_RGB
        if _has_transparency(content):
            flags = cv2.IMREAD_UNCHANGED
        elif not self.upright:
            flags |= cv2.IMREAD_IGNORE_ORIENTATION
        try:
            # OpenCV has its own limit, which it read from the environment at its first import.
            if _png_pixels(content) > MOST_PIXELS:
                raise cv2.error("too many pixels")
            # imdecode fails without bytes, and returns None for what it cannot decode.
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
        except cv2.error as error:
            raise ValueError(
                f"{file_name(element, 'the image')} must have at most {MOST_PIXELS:,} pixels and "
                f"be decodable, received {len(content)} bytes ({error}); make it smaller"
            ) from error
        if pixels is None:
            raise ValueError(
                f"{file_name(element, 'the image')} must be a whole JPEG or PNG image, received "
                f"{len(content)} bytes that cannot be decoded; fetch it again"
            )
        if flags == cv2.IMREAD_UNCHANGED:
            pixels = _on_white(pixels)
        return {key: element[key] for key in element if key != "file_name"} | {"image": pixels}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CentralCrop:
    """A transform that cuts out the central crop, on which ImageNet networks are evaluated.

    The shorter side is resized to ``resize``, and the longer one in proportion, rounded down.
    Then the central square of ``image_size`` is cut out.

    Attributes:
        image_size: Side of the square, in pixels.
        resize: Shorter side of the resized image, in pixels.

    Raises:
        ValueError: Unless ``1 <= image_size <= resize``.
    """

    image_size: int = 224
    resize: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= self.resize:
            raise ValueError(
                "image_size must be positive and resize at least as large, or the crop would leave "
                f"the image; received {self.image_size} and {self.resize}"
            )

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """Crops ``element["image"]``, uint8 ``[H, W, 3]``, to ``[image_size, image_size, 3]``."""
        image, size = element["image"], self.image_size
        shorter = min(image.shape[:2])
        height, width = (side * self.resize // shorter for side in image.shape[:2])
        # Rounded as torchvision does.
        top, left = round((height - size) / 2), round((width - size) / 2)
        resized = resize(image, height, width)
        return {**element, "image": resized[top : top + size, left : left + size]}


def _png_pixels(content: bytes) -> int:
    """Returns the number of pixels in the header of a PNG; 0 for another file."""
    width, height = content[16:20], content[20:24]
    return int.from_bytes(width) * int.from_bytes(height) if content[:8] == _PNG else 0


def _has_transparency(content: bytes) -> bool:
    """Returns whether the content is a PNG with an alpha channel or transparent colors."""
    # Byte 25 of the header is the color type; a chunk of transparency precedes the pixels.
    return content[:8] == _PNG and (
        content[25:26] in (b"\x04", b"\x06") or b"tRNS" in content[:4096]
    )


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """Lays blue, green, red and alpha on white; returns uint8 red, green and blue."""
    if pixels.dtype == np.uint16:
        pixels = (pixels // 257).astype(np.uint8)
    if pixels.shape[-1] != 4:
        return pixels[..., 2::-1]
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return np.round(pixels[..., 2::-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 ``[h, w, channels]`` by area averages or, to enlarge, linear interpolation."""
    cv2 = import_cv2()
    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(pixels, (width, height), interpolation=method)


@functools.cache
def import_cv2() -> Any:
    """Imports OpenCV with its threading disabled, since several threads decode images."""
    # OpenCV reads its limit when it is imported.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))
    cv2 = require("cv2", extra="jpeg")
    cv2.setNumThreads(0)
    return cv2
