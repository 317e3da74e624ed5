"""Masks of objects, drawn from segmentations in the frames of boxes, and run-length codes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from wsbcn_flax._extras import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class RasterizeMasks:
    """A transform that draws every object's segmentation in the frame of its own box.

    A mask is a grid of ``size`` by ``size`` cells over the box. Polygons are drawn into it as
    pycocotools draws them, and RLEs are read at the centres of the cells. A mask does not change
    when its image is resized, and a flip of the image mirrors it. This transform takes the boxes
    of the original image, so it comes before `ResizeShorter` and `RandomFlipObjects`.

    Attributes:
        size: Side of the masks, in pixels.

    Raises:
        ValueError: If ``size`` is not positive; while mapping, if an RLE is damaged.
        ImportError: While mapping, if pycocotools is not installed; names the extra.

    Example:
        >>> import numpy as np
        >>> left_half = (np.float32([0, 0, 4, 0, 4, 6, 0, 6]),)
        >>> element = {"boxes": np.float32([[0, 0, 8, 6]]), "segmentations": (left_half,)}
        >>> RasterizeMasks(size=2).map(element)["masks"].tolist()
        [[[1, 0], [1, 0]]]
    """

    size: int = 112

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be a positive number of pixels, received {self.size}")

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """Replaces "segmentations" by "masks", uint8 ``[n, size, size]``."""
        boxes, segmentations = element["boxes"], element["segmentations"]
        masks = np.zeros((len(boxes), self.size, self.size), np.uint8)
        for mask, box, segmentation in zip(masks, boxes, segmentations, strict=True):
            mask[:] = self._draw(segmentation, box)
        return {key: element[key] for key in element if key != "segmentations"} | {"masks": masks}

    def _draw(self, segmentation: Any, box: np.ndarray) -> np.ndarray:
        corner, sides = box[:2], box[2:] - box[:2]
        if isinstance(segmentation, Mapping):
            whole = decode_rle(segmentation)
            centres = corner + (np.arange(self.size)[:, np.newaxis] + 0.5) / self.size * sides
            x, y = np.minimum(centres.astype(int), np.array(whole.shape)[::-1] - 1).T
            return whole[np.ix_(y, x)]
        coco_mask = require("pycocotools.mask", extra="coco")
        polygons = [
            ((polygon.reshape(-1, 2) - corner) * (self.size / sides)).ravel().tolist()
            for polygon in segmentation
        ]
        parts = coco_mask.frPyObjects(polygons, self.size, self.size)
        return coco_mask.decode(coco_mask.merge(parts))


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encodes zeros and ones ``[H, W]`` as COCO's compressed run-length code, ready for JSON.

    Raises:
        ImportError: If pycocotools is not installed; names the extra.

    Example:
        >>> import numpy as np
        >>> encode_rle(np.eye(3))
        {'size': [3, 3], 'counts': '013000'}
    """
    coco_mask = require("pycocotools.mask", extra="coco")
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """Decodes a run-length code, whose counts are text or a list, to uint8 ``[H, W]``.

    Raises:
        ValueError: If the counts are damaged.
        ImportError: If pycocotools is not installed; names the extra.

    Example:
        >>> decode_rle({"size": [2, 3], "counts": [1, 2, 3]}).tolist()
        [[0, 1, 0], [1, 0, 0]]
    """
    coco_mask = require("pycocotools.mask", extra="coco")
    is_list = isinstance(rle["counts"], list)
    return coco_mask.decode(coco_mask.frPyObjects(rle, *rle["size"]) if is_list else rle)
