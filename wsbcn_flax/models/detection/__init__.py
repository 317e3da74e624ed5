"""Faster and Mask R-CNN with a feature pyramid and injected convolution and normalization."""

from wsbcn_flax.models.detection._box_head import BoxHead
from wsbcn_flax.models.detection._fpn import FPN
from wsbcn_flax.models.detection._mask_head import MaskHead
from wsbcn_flax.models.detection._mask_rcnn import MaskRCNN
from wsbcn_flax.models.detection._rpn_head import RPNHead

__all__ = ["FPN", "BoxHead", "MaskHead", "MaskRCNN", "RPNHead"]
