"""Anchors: the published sides in both conventions, centers and order."""

import numpy as np
import pytest

from wsbcn_flax.ops.detection import AUTHORS, TORCHVISION, BoxConvention, pyramid_anchors

# Width x height at strides 4 to 64 and ratios .5, 1, 2, from maskrcnn-benchmark.
AUTHORS_SIDES = [
    [(48, 24), (32, 32), (24, 48)],
    [(88, 48), (64, 64), (48, 96)],
    [(184, 96), (128, 128), (88, 176)],
    [(360, 176), (256, 256), (184, 368)],
    [(728, 368), (512, 512), (360, 720)],
]
# Second corner of each anchor in AnchorGenerator.cell_anchors of torchvision 0.29.1.
TORCHVISION_CORNERS = [
    [(23, 11), (16, 16), (11, 23)],
    [(45, 23), (32, 32), (23, 45)],
    [(91, 45), (64, 64), (45, 91)],
    [(181, 91), (128, 128), (91, 181)],
    [(362, 181), (256, 256), (181, 362)],
]
ONE_POSITION = [(1, 1)] * 5


def test_authors_anchors():
    levels = pyramid_anchors(ONE_POSITION, convention=AUTHORS)
    for anchors, sides, stride in zip(levels, AUTHORS_SIDES, (4, 8, 16, 32, 64), strict=True):
        np.testing.assert_array_equal(anchors[:, 2:] - anchors[:, :2] + 1, sides)
        np.testing.assert_array_equal(anchors[:, 2:] + anchors[:, :2], stride - 1)


def test_torchvision_anchors():
    levels = pyramid_anchors(ONE_POSITION, convention=TORCHVISION)
    for anchors, corners in zip(levels, TORCHVISION_CORNERS, strict=True):
        np.testing.assert_array_equal(anchors, np.concatenate([-np.array(corners), corners], -1))


def test_rows_run_over_y_then_x_then_ratios():
    (one,) = pyramid_anchors([(1, 1)], strides=(8,), sizes=(32,))
    (anchors,) = pyramid_anchors([(4, 5)], strides=(8,), sizes=(32,))
    shifted = anchors.reshape(4, 5, 3, 4)[2, 3] - one
    np.testing.assert_array_equal(shifted, np.tile([24.0, 16.0, 24.0, 16.0], (3, 1)))


def test_count_at_the_published_image_size():
    level_hw = [(-(-800 // stride), -(-1344 // stride)) for stride in (4, 8, 16, 32, 64)]
    levels = pyramid_anchors(level_hw)
    assert sum(map(len, levels)) == 268_569
    assert {anchors.dtype for anchors in levels} == {np.dtype("float32")}


def test_bad_options_are_errors():
    with pytest.raises(ValueError, match="one entry for each level, received 1, 5 and 5"):
        pyramid_anchors([(1, 1)])
    with pytest.raises(ValueError, match="pixel must be 0 or 1, received 2"):
        BoxConvention(
            pixel=2,
            anchor_rounding="at_size",
            border_anchors=True,
            proposals_per="image",
            box_beta=1.0,
        )
