"""Encoded images to pixels, and pixels to another size, by OpenCV."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from wsbcn_flax._extras import require
from wsbcn_flax.data._sources import file_name

_PNG = b"\x89PNG\r\n\x1a\n"
MOST_PIXELS = 2**26  # Pixels of an image; larger ones are refused before they are decoded.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeImage:
    """Decodes the image file in an example to red, green and blue of 8 bits.

    It decodes every format that OpenCV knows. Grey becomes three equal channels, 16 bits are scaled
    to 8, transparent pixels are laid on white, and the image is turned as its camera noted. An
    entry ``"file_name"`` serves the error message and is dropped.

    Attributes:
        upright: Whether to turn the image as its camera noted; annotations may not expect it.

    Raises:
        ImportError: While mapping, if OpenCV is not installed; names the extra.
        ValueError: While mapping, if the content is no image, not a whole one, or of more than
            67 million pixels.

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
        """Decodes ``element["image"]``, bytes, to uint8 ``[H, W, 3]``, red first."""
        cv2 = import_cv2()
        content = element["image"]
        flags = cv2.IMREAD_COLOR_RGB
        if _has_transparency(content):
            flags = cv2.IMREAD_UNCHANGED
        elif not self.upright:
            flags |= cv2.IMREAD_IGNORE_ORIENTATION
        try:
            # OpenCV has its own limit, read from the environment when it was first imported.
            if _png_pixels(content) > MOST_PIXELS:
                raise cv2.error("too many pixels")
            # It asserts that there are bytes, and returns None for what it cannot decode.
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
        except cv2.error as error:
            raise ValueError(
                f"{file_name(element, 'the image')} must have at most {MOST_PIXELS:,} pixels and "
                f"decode, received {len(content)} bytes ({error}); make it smaller"
            ) from error
        if pixels is None:
            raise ValueError(
                f"{file_name(element, 'the image')} must be a whole JPEG or PNG image, received "
                f"{len(content)} bytes that do not decode; fetch it again"
            )
        if flags == cv2.IMREAD_UNCHANGED:
            pixels = _on_white(pixels)
        return {key: element[key] for key in element if key != "file_name"} | {"image": pixels}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CentralCrop:
    """The central crop, on which ImageNet networks are evaluated.

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
    """The number of pixels that the header of a PNG announces; 0 for another file."""
    width, height = content[16:20], content[20:24]
    return int.from_bytes(width) * int.from_bytes(height) if content[:8] == _PNG else 0


def _has_transparency(content: bytes) -> bool:
    """Whether a PNG has an alpha channel or transparent colors."""
    # The header's byte 25 is the kind of color; a chunk of transparency comes before the pixels.
    return content[:8] == _PNG and (
        content[25:26] in (b"\x04", b"\x06") or b"tRNS" in content[:4096]
    )


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """Lays blue, green, red and alpha on white, as uint8 red, green and blue."""
    if pixels.dtype == np.uint16:
        pixels = (pixels // 257).astype(np.uint8)
    if pixels.shape[-1] != 4:
        return pixels[..., 2::-1]
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return np.round(pixels[..., 2::-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 ``[h, w, channels]``, averaging areas or, to grow, interpolating linearly."""
    cv2 = import_cv2()
    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(pixels, (width, height), interpolation=method)


@functools.cache
def import_cv2() -> Any:
    """Imports OpenCV with its own threading disabled: images are decoded in several threads."""
    # OpenCV reads its limit when it is imported.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))
    cv2 = require("cv2", extra="jpeg")
    cv2.setNumThreads(0)
    return cv2
