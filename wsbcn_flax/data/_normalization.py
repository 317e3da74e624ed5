"""Per-channel normalization of uint8 images, with constants measured on the training split."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

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
"""Statistics of red, green and blue over ImageNet, as the published networks expect them."""

_CACHED = 2**16


def channel_statistics(images: np.ndarray) -> ChannelStatistics:
    """Measures the mean and standard deviation of each channel over all pixels.

    Both come from exact counts of the 256 values. The variance is taken about the mean, which
    avoids cancellation.

    Args:
        images: Images of the training split, uint8 ``[N, height, width, channels]``.

    Returns:
        Mean and standard deviation in units of the full scale, 255.

    Raises:
        ValueError: If ``images`` is not a non-empty uint8 array of rank 4.

    Example:
        >>> import numpy as np
        >>> images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
        >>> channel_statistics(images)
        ChannelStatistics(mean=array([0.5], dtype=float32), std=array([0.5], dtype=float32))
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
        raise ValueError(
            "images must be uint8 [N, height, width, channels] and not empty, "
            f"received {images.dtype} {list(images.shape)}"
        )
    counts, values = np.zeros((images.shape[-1], 256)), np.arange(256) / 255
    for start in range(0, len(images), 1000):  # bincount makes a 64-bit copy of its input.
        for channel, count in enumerate(counts):
            count += np.bincount(images[start : start + 1000, ..., channel].ravel(), minlength=256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    variance = np.sum(shares * np.square(values - mean[:, np.newaxis]), axis=1)
    return ChannelStatistics(mean.astype(np.float32), np.sqrt(variance).astype(np.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class Normalize:
    """A transform of uint8 images to float32 ``(image / 255 - mean) / std``.

    It transforms an example (``[H, W, C]``) or a batch (``[N, H, W, C]``).

    Attributes:
        mean: Mean of each channel, ``[C]``, in units of the full scale.
        std: Standard deviation of each channel, ``[C]``, positive.

    Raises:
        ValueError: If ``mean`` and ``std`` are not ``[C]`` and finite, or a ``std`` is not
            positive; while mapping, if the images have another number of channels.

    Example:
        >>> import numpy as np
        >>> normalize = Normalize(mean=[0.5], std=[0.25])
        >>> normalize.map({"image": np.full((1, 1, 1), 255, np.uint8)})["image"].tolist()
        [[[2.0]]]
    """

    mean: ArrayLike
    std: ArrayLike
    _scale: np.ndarray = dataclasses.field(init=False, repr=False)
    _offset: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        same = mean.shape == std.shape and mean.ndim == 1
        if not same or not np.isfinite(mean + std).all() or (std <= 0).any():
            raise ValueError(
                "mean and std must be finite, one for each channel, and std positive; received "
                f"{mean} and {std}: is a channel constant?"
            )
        for name, value in (("_scale", 1 / (255 * std)), ("_offset", -mean / std)):
            object.__setattr__(self, name, value.astype(np.float32))

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """Normalizes ``element["image"]``."""
        image = element["image"]
        *_, width, channels = image.shape
        if channels != len(self._scale):
            raise ValueError(
                f"mean and std must be one number for each of {channels} channels, received "
                f"{len(self._scale)}"
            )
        # With whole rows of pixels, numpy's inner loop is width * channels long, not channels. Each
        # pass takes as many rows as stay in the processor's cache.
        rows = image.reshape(-1, width * channels)
        scale, offset = np.tile(self._scale, width), np.tile(self._offset, width)
        normalized, step = np.empty(rows.shape, np.float32), max(1, _CACHED // rows.shape[1])
        for start in range(0, len(rows), step):
            part = normalized[start : start + step]
            np.multiply(rows[start : start + step], scale, out=part)
            part += offset
        return {**element, "image": normalized.reshape(image.shape)}
