"""Transforms of an image together with the boxes and masks of its objects."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from wsbcn_flax.data._decoding import DecodeImage, resize
from wsbcn_flax.data._normalization import ChannelStatistics
from wsbcn_flax.data._sources import file_name

CAFFE_BGR_STATISTICS = ChannelStatistics(
    mean=np.array([102.9801, 115.9465, 122.7717], np.float32) / 255,
    std=np.ones(3, np.float32) / 255,
)
"""Statistics that keep blue, green and red at the scale 0 to 255 and subtract ImageNet's means.

The published detectors expect such images. Apply `ToBGR` first.
"""


@dataclasses.dataclass(frozen=True)
class DecodeAnnotatedImage:
    """A transform that decodes an example's image file and checks that its size is as annotated.

    Raises:
        ImportError: While mapping, if OpenCV is not installed; names the extra.
        ValueError: While mapping, if the content is not a complete image or has another size; names
            the file.
    """

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes the bytes ``element["image"]`` to RGB, uint8 ``[height, width, 3]``."""
        decoded = DecodeImage(upright=False).map(element)
        expected, found = (element["height"], element["width"]), decoded["image"].shape[:2]
        if found != expected:
            turned = found == expected[::-1]
            raise ValueError(
                f"{file_name(element, 'the image')} must be {_by(expected)} as annotated, received "
                f"{_by(found)}; "
                + ("the orientation tag is ignored, so save the image upright" * turned)
                + ("annotate the image again" * (not turned))
            )
        return {key: decoded[key] for key in decoded if key not in ("height", "width")}


@dataclasses.dataclass(frozen=True)
class ToBGR:
    """A transform that reverses an image's channels, since Caffe's networks expect blue first."""

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """Reverses ``element["image"]``, ``[..., C]``."""
        return {**element, "image": element["image"][..., ::-1]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeShorter:
    """A transform that resizes an image to a given shorter side, and scales its boxes.

    The scale is ``min(shorter / min(H, W), longer / max(H, W))``. Sides are rounded, and boxes are
    scaled by the ratios of the rounded sides.

    Attributes:
        shorter: Shorter side of the result in pixels, unless the longer one would exceed its limit.
        longer: Upper limit of the longer side of the result in pixels.

    Raises:
        ValueError: Unless ``1 <= shorter <= longer``.

    Example:
        >>> ResizeShorter().size(480, 640), ResizeShorter().size(300, 600)
        ((800, 1067), (666, 1333))
    """

    shorter: int = 800
    longer: int = 1333

    def __post_init__(self) -> None:
        if not 1 <= self.shorter <= self.longer:
            raise ValueError(
                "shorter and longer must be numbers of pixels, 1 <= shorter <= longer, received "
                f"{self.shorter} and {self.longer}"
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width of the result for an image of this size."""
        scale = min(self.shorter / min(height, width), self.longer / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """Resizes ``element["image"]``, uint8 ``[H, W, 3]``, and scales ``element["boxes"]``."""
        height, width, _ = element["image"].shape
        h, w = self.size(height, width)
        ratios = np.array([w / width, h / height] * 2, np.float32)
        return {
            **element,
            "image": resize(element["image"], h, w),
            "boxes": element["boxes"] * ratios,
        }


@dataclasses.dataclass(frozen=True)
class RandomFlipObjects:
    """A transform that mirrors image, boxes and masks left-right with probability 1/2.

    Apply it before `PadImage` and `PadBoxes`.

    Example:
        >>> import numpy as np
        >>> element = {"image": np.zeros((4, 8, 3)), "boxes": np.float32([[0, 1, 2, 3]])}
        >>> flipped = RandomFlipObjects().random_map(element, np.random.default_rng(0))
        >>> flipped["boxes"].tolist()
        [[6.0, 1.0, 8.0, 3.0]]
    """

    def random_map(self, element: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Flips "image" ``[H, W, C]``, "boxes" ``[n, 4]`` and, if present, "masks"."""
        if rng.random() < 0.5:
            return dict(element)
        width = element["image"].shape[1]
        x1, y1, x2, y2 = element["boxes"].T
        flipped = {
            "image": element["image"][:, ::-1],
            "boxes": np.stack([width - x2, y1, width - x1, y2], axis=-1),
        }
        if "masks" in element:
            flipped["masks"] = element["masks"][..., ::-1]
        return {**element, **flipped}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PadBoxes:
    """A transform that pads boxes, labels and masks with zeros to a fixed number of slots.

    Attributes:
        slots: Number G of slots.

    Raises:
        ValueError: While mapping, if there are more objects than slots; names the image's id.

    Example:
        >>> import numpy as np
        >>> element = {"boxes": np.ones((1, 4), np.float32), "labels": np.array([3], np.int32)}
        >>> padded = PadBoxes(slots=2).map(element)
        >>> padded["labels"].tolist(), padded["valid"].tolist(), padded["boxes"].shape
        ([3, 0], [True, False], (2, 4))
    """

    slots: int = 100

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """Pads to "boxes" ``[G, 4]``, "labels" ``[G]``, "masks" ``[G, M, M]``; adds "valid"."""
        count = len(element["boxes"])
        if count > self.slots:
            raise ValueError(
                f"image {element.get('id', '')} has {count} objects for {self.slots} slots; raise "
                "PadBoxes.slots"
            )
        padded = {"valid": np.arange(self.slots) < count}
        for key in {"boxes", "labels", "masks"} & set(element):
            rest = [(0, 0)] * (element[key].ndim - 1)
            padded[key] = np.pad(element[key], [(0, self.slots - count), *rest])
        return {**element, **padded}


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"
