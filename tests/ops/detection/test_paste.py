"""Pasting equals a plain loop of both references' code, at the border and outside."""

import math

import numpy as np
import pytest

from wsbcn_flax.ops.detection import paste_mask

IMAGE_HW = (40, 50)
BOXES = [
    (5.3, 7.9, 30.2, 25.1),
    (-10.5, -4.2, 20.7, 30.0),  # Crosses the border: corners are truncated towards zero.
    (30.0, 20.0, 70.0, 60.0),
    (-30.0, -20.0, 90.0, 70.0),
    (12.2, 12.2, 12.2, 12.2),
    (10.0, 10.0, 11.0, 39.0),
]


def looped_paste(mask, box, image_hw):
    """Pastes like expand_masks, expand_boxes and F.interpolate, by a loop over pixels."""
    side = len(mask) + 2
    padded = np.zeros((side, side))
    padded[1:-1, 1:-1] = mask
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half_w, half_h = ((box[i + 2] - box[i]) / 2 * side / len(mask) for i in (0, 1))
    x1, y1, x2, y2 = map(math.trunc, (x - half_w, y - half_h, x + half_w, y + half_h))
    width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    pasted = np.zeros(image_hw, bool)
    for i, j in np.ndindex(*image_hw):
        if y1 <= i <= y2 and x1 <= j <= x2:
            v = max((i - y1 + 0.5) * side / height - 0.5, 0)
            u = max((j - x1 + 0.5) * side / width - 0.5, 0)
            top, left = min(int(v), side - 1), min(int(u), side - 1)
            bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
            v, u = v - top, u - left
            value = (1 - v) * ((1 - u) * padded[top, left] + u * padded[top, right]) + v * (
                (1 - u) * padded[bottom, left] + u * padded[bottom, right]
            )
            pasted[i, j] = value > 0.5
    return pasted


@pytest.mark.parametrize("box", BOXES)
def test_equals_a_loop_over_pixels(box):
    mask = np.random.default_rng(0).random((28, 28)).astype(np.float32)
    expected = looped_paste(mask, box, IMAGE_HW)
    np.testing.assert_array_equal(paste_mask(mask, np.array(box), IMAGE_HW), expected)
    solid = np.ones((28, 28), np.float32)
    actual = paste_mask(solid, np.array(box), IMAGE_HW)
    np.testing.assert_array_equal(actual, looped_paste(solid, box, IMAGE_HW))
    assert actual.any()


def test_a_box_outside_the_image_pastes_nothing():
    for box in ((60, 10, 80, 20), (-30, -30, -10, -10), (20, 20, 10, 10)):
        assert not paste_mask(np.ones((28, 28)), np.array(box), IMAGE_HW).any()


def test_the_threshold_is_exclusive():
    half = np.full((4, 4), 0.5, np.float32)
    box = np.array([10, 10, 30, 30])
    assert not paste_mask(half, box, IMAGE_HW).any()
    assert paste_mask(half, box, IMAGE_HW, threshold=0.4).any()


def test_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match=r"received \(28, 27\) and \(4,\)"):
        paste_mask(np.ones((28, 27)), np.zeros(4), IMAGE_HW)
