"""Pure functions with static shapes, of boxes, masks and maps, for two-stage detection."""

from wsbcn_flax.ops.detection._anchors import pyramid_anchors
from wsbcn_flax.ops.detection._boxes import box_area, box_iou, clip_boxes, trained_anchors
from wsbcn_flax.ops.detection._class_nms import class_nms
from wsbcn_flax.ops.detection._coding import decode_boxes, encode_boxes
from wsbcn_flax.ops.detection._conventions import AUTHORS, TORCHVISION, BoxConvention
from wsbcn_flax.ops.detection._mask_targets import bitmap_targets, mask_targets
from wsbcn_flax.ops.detection._matcher import Matches, match_boxes
from wsbcn_flax.ops.detection._nms import nms
from wsbcn_flax.ops.detection._paste import paste_mask
from wsbcn_flax.ops.detection._pyramid_roi_align import pyramid_roi_align, roi_levels
from wsbcn_flax.ops.detection._roi_align import roi_align
from wsbcn_flax.ops.detection._sampler import Samples, sample_matches

__all__ = [
    "AUTHORS",
    "TORCHVISION",
    "BoxConvention",
    "Matches",
    "Samples",
    "bitmap_targets",
    "box_area",
    "box_iou",
    "class_nms",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "mask_targets",
    "match_boxes",
    "nms",
    "paste_mask",
    "pyramid_anchors",
    "pyramid_roi_align",
    "roi_align",
    "roi_levels",
    "sample_matches",
    "trained_anchors",
]
