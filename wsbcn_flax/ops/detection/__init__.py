"""Pure functions of boxes, masks and feature maps for two-stage detection, of static shapes."""

from wsbcn_flax.ops.detection._anchors import pyramid_anchors
from wsbcn_flax.ops.detection._boxes import box_area, box_iou, clip_boxes, trained_anchors
from wsbcn_flax.ops.detection._coding import decode_boxes, encode_boxes
from wsbcn_flax.ops.detection._conventions import AUTHORS, TORCHVISION, BoxConvention
from wsbcn_flax.ops.detection._matcher import Matches, match_boxes
from wsbcn_flax.ops.detection._nms import class_nms, nms
from wsbcn_flax.ops.detection._sampler import Samples, sample_matches

__all__ = [
    "AUTHORS",
    "TORCHVISION",
    "BoxConvention",
    "Matches",
    "Samples",
    "box_area",
    "box_iou",
    "class_nms",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "match_boxes",
    "nms",
    "pyramid_anchors",
    "sample_matches",
    "trained_anchors",
]
