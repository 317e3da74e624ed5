"""Encoded images to pixels, and pixels to another size, by OpenCV."""

import functools
from typing import Any

import numpy as np


@functools.cache
def import_cv2() -> Any:
    """OpenCV, told to leave threads to us.

    Raises:
        ImportError: if it is not installed; names the extra.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "decoding images needs OpenCV, which is not installed; "
            "run: pip install 'wsbcn_flax[jpeg]'"
        ) from error
    # Images are decoded in several threads already; OpenCV's own would only contend with them.
    cv2.setNumThreads(0)
    return cv2


def decode_rgb(content: bytes, *, name: str) -> np.ndarray:
    """Decodes an image file of any format OpenCV knows, grey ones to three equal channels.

    The orientation that a camera noted is ignored, as data sets' own readers do.

    Args:
        content: of the file.
        name: of the image, for the error.

    Returns:
        uint8 ``[height, width, 3]``, red first.

    Raises:
        ValueError: if the content is no image, or not a whole one.
        ImportError: if OpenCV is not installed; names the extra.
    """
    cv2 = import_cv2()
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    # OpenCV asserts that there are bytes, and returns None for what it cannot decode.
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    if pixels is None:
        raise ValueError(
            f"{name} must be a whole JPEG or PNG image, received {len(content)} bytes that do not "
            "decode; fetch it again"
        )
    return pixels


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 ``[h, w, channels]`` to ``[height, width, channels]``.

    Shrinking averages the area of each new pixel, so that nothing aliases; growing along any axis
    interpolates linearly.
    """
    cv2 = import_cv2()
    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(pixels, (width, height), interpolation=method)
