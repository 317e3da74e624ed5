"""Per-channel normalization of uint8 images, with constants measured on the training split."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class ChannelStatistics(NamedTuple):
    """Per-channel mean and standard deviation of images scaled to 0..1.

    Attributes:
        mean: float32 ``[channels]``.
        std: float32 ``[channels]``, the population's (divided by N, not N - 1).
    """

    mean: np.ndarray
    std: np.ndarray


IMAGENET_STATISTICS = ChannelStatistics(
    mean=np.array([0.485, 0.456, 0.406], np.float32),
    std=np.array([0.229, 0.224, 0.225], np.float32),
)
"""Of red, green and blue over ImageNet's training images, as the published networks take them."""


def channel_statistics(images: np.ndarray) -> ChannelStatistics:
    """Measures the mean and standard deviation of each channel over all pixels.

    Both come from the histogram of the 256 values of a channel, whose counts are exact; the
    variance is taken about the mean, so nothing cancels.

    Args:
        images: uint8 ``[N, height, width, channels]``, of the training split.

    Returns:
        Mean and standard deviation in units of the full scale, 255.

    Raises:
        ValueError: if ``images`` is not a non-empty uint8 array of rank 4.

    Example:
        >>> import numpy as np
        >>> images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
        >>> channel_statistics(images)
        ChannelStatistics(mean=array([0.5], dtype=float32), std=array([0.5], dtype=float32))
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
        raise ValueError(
            "images must be uint8 [N, height, width, channels] and not empty, "
            f"got {images.dtype} {list(images.shape)}"
        )
    channels = np.moveaxis(images, -1, 0)
    counts = np.stack([_histogram(channel) for channel in channels])
    shares = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = shares @ values
    variance = np.sum(shares * np.square(values - mean[:, np.newaxis]), axis=1)
    return ChannelStatistics(mean.astype(np.float32), np.sqrt(variance).astype(np.float32))


def _histogram(channel: np.ndarray) -> np.ndarray:
    """int64 ``[256]``: how often each value occurs in uint8 ``[N, height, width]``."""
    # By chunks: bincount makes a 64-bit copy of what it counts.
    chunks = np.array_split(channel, math.ceil(len(channel) / 1000))
    return np.sum([np.bincount(chunk.ravel(), minlength=256) for chunk in chunks], axis=0)


class Normalizer:
    """Maps uint8 images to float32 ``(image / 255 - mean) / std``.

    Args:
        mean: one value for each channel, in units of the full scale.
        std: likewise, positive.
        image_shape: ``(height, width, channels)`` of the images to come.

    Raises:
        ValueError: if ``mean`` or ``std`` is not ``[channels]``, is not finite, or a ``std`` is
            not positive.
    """

    def __init__(
        self, mean: ArrayLike, std: ArrayLike, *, image_shape: tuple[int, int, int]
    ) -> None:
        _, width, channels = image_shape
        mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != (channels,) or not np.isfinite(value).all():
                raise ValueError(
                    f"{name} must be one finite number for each of {channels} channels, got {value}"
                )
        if (std <= 0).any():
            raise ValueError(f"std must be positive, got {std}: is a channel constant?")
        # Tiled over a row of pixels: numpy's inner loop is then width * channels long, not channels
        # (six times as fast for three channels).
        self._scale = np.tile(1 / (255 * std), width).astype(np.float32)
        self._offset = np.tile(-mean / std, width).astype(np.float32)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Normalizes uint8 ``[N, height, width, channels]`` to float32 of the same shape."""
        rows = images.reshape(*images.shape[:2], len(self._scale)).astype(np.float32)
        rows *= self._scale
        rows += self._offset
        return rows.reshape(images.shape)
