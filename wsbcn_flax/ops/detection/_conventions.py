"""Conventions of boxes in which published detectors differ, as two presets."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxConvention:
    """A detector's conventions, for results that match a published implementation.

    Attributes:
        pixel: Pixels added to x2 - x1 and y2 - y1 to obtain a width and a height. It is 1 where x2
            and y2 are the last pixel of a box, else 0. Boxes are clipped to the image size minus
            ``pixel``.
        anchor_rounding: Rounding of anchor sides. "at_stride" rounds them at the size of the stride
            and then scales them around the stride's center. "at_size" rounds them at their own size
            around 0.
        border_anchors: Whether anchors that cross the border of the image are trained.
        proposals_per: Scope of the final number of training proposals, a device's batch ("device")
            or an image ("image").
        box_beta: Width of the quadratic part of the box head's smooth L1 loss.

    Raises:
        ValueError: If ``pixel`` is neither 0 nor 1, or ``box_beta`` is not positive.

    Example:
        >>> from wsbcn_flax.ops.detection import AUTHORS, TORCHVISION
        >>> AUTHORS.pixel, TORCHVISION.pixel
        (1, 0)
    """

    pixel: int
    anchor_rounding: Literal["at_stride", "at_size"]
    border_anchors: bool
    proposals_per: Literal["device", "image"]
    box_beta: float

    def __post_init__(self):
        if self.pixel not in (0, 1):
            raise ValueError(f"pixel must be 0 or 1, received {self.pixel}.")
        if not self.box_beta > 0:
            raise ValueError(f"box_beta must be positive, received {self.box_beta}.")


AUTHORS = BoxConvention(
    pixel=1,
    anchor_rounding="at_stride",
    border_anchors=False,
    proposals_per="device",
    box_beta=1.0,
)
"""maskrcnn-benchmark, which the authors of Weight Standardization trained with."""

TORCHVISION = BoxConvention(
    pixel=0,
    anchor_rounding="at_size",
    border_anchors=True,
    proposals_per="image",
    box_beta=1 / 9,
)
"""torchvision's detection models."""
