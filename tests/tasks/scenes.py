"""Images of bright rectangles, and a detector small enough to compile in a test."""

import functools

import flax.linen as nn
import numpy as np

from wsbcn_flax import BatchChannelNorm
from wsbcn_flax.models import BasicBlock, ResNet
from wsbcn_flax.models.detection import MaskRCNN
from wsbcn_flax.tasks import Detection

BCN = functools.partial(BatchChannelNorm, num_groups=4)
GN = functools.partial(nn.GroupNorm, num_groups=4)
SLOTS = 3


def tiny(*, norm=BCN, with_mask=True, **options):
    """Makes a detector of two classes, with ``norm`` in the pyramid and the heads."""
    backbone = ResNet(
        (1, 1, 1, 1),
        features=8,
        block=BasicBlock,
        stem_features=8,
        num_classes=None,
        frozen_stages=2,
        norm=GN,
    )
    model = MaskRCNN(
        backbone, num_classes=2, features=16, hidden=32, norm=norm, with_mask=with_mask
    )
    defaults = {
        "anchor_sizes": (8, 16, 32, 48, 64),
        "anchors": 32,
        "regions": 16,
        "proposals": (32, 16),
        "detections": 8,
    }
    return Detection(model=model, **(defaults | options))


def scenes(count, *, seed=0, size=64):
    """Makes a batch of images with up to three rectangles; every fourth image has none.

    Every third image is smaller and padded.
    """
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.normal(0, 0.1, (count, size, size, 3)).astype(np.float32),
        "image_hw": np.array(
            [[size - 16, size] if i % 3 == 2 else [size, size] for i in range(count)]
        ),
        "id": np.arange(count, dtype=np.int32) + 7,
        "boxes": np.zeros((count, SLOTS, 4), np.float32),
        "labels": np.zeros((count, SLOTS), np.int32),
        "valid": np.zeros((count, SLOTS), bool),
        "masks": np.zeros((count, SLOTS, 16, 16), np.uint8),
    }
    for image in range(count):
        height, width = batch["image_hw"][image]
        batch["image"][image, height:] = 0
        for slot in range(image % (SLOTS + 1)):
            w, h = rng.integers(12, 40, 2)
            x1, y1 = rng.integers(0, width - w), rng.integers(0, height - h)
            x2, y2 = x1 + w, y1 + h
            label = 1 + slot % 2
            batch["image"][image, y1:y2, x1:x2, label] += 2
            batch["boxes"][image, slot] = x1, y1, x2, y2
            batch["labels"][image, slot] = label
            batch["valid"][image, slot] = True
            batch["masks"][image, slot] = 1
    return batch
