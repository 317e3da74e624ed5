"""RoIAlign over a pyramid chooses each box's level and applies roi_align there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_oracles import random_boxes
from oracles import normal, tree_relative_error, value_and_vjp

from wsbcn_flax.ops.detection import AUTHORS, pyramid_roi_align, roi_align, roi_levels

STRIDES = (4, 8, 16, 32)


def pyramid_of(images, pixels=128):
    return [normal(s, images, pixels // s, pixels // s + 1, 2) for s in STRIDES]


def boxes_of(images, count):
    """Makes boxes of all levels, with no area at the boundary between two levels."""
    sides = np.resize([30.0, 150, 300, 500], images * count)
    center = np.random.default_rng(0).uniform(0, 128, (images * count, 2))
    half = np.stack([sides, sides * 1.1], -1) / 2
    boxes = np.concatenate([center - half, center + half], -1)
    return boxes.astype(np.float32).reshape(images, count, 4)


def test_levels_follow_the_formula():
    sides = np.array([1, 60, 111, 113, 223, 225, 447, 449, 3000], np.float32)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], -1)
    expected = np.clip(np.floor(4 + np.log2(sides / 224 + 1e-6)), 2, 5) - 2
    np.testing.assert_array_equal(roi_levels(boxes), expected)
    assert expected.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    two = np.clip(expected + 2, 3, 4) - 3
    np.testing.assert_array_equal(roi_levels(boxes, strides=(8, 16)), two)


def test_a_box_without_area_uses_the_finest_level():
    assert roi_levels(jnp.array([[5.0, 5, 5, 5], [9, 9, 5, 5]])).tolist() == [0, 0]


def test_conventions_differ_at_a_boundary():
    box = jnp.array([0.0, 0.0, 223.5, 223.5])
    assert (int(roi_levels(box)), int(roi_levels(box, convention=AUTHORS))) == (1, 2)


@pytest.mark.parametrize("implementation", ["gather", "einsum"])
def test_equals_roi_align_on_the_level_of_each_box(implementation):
    pyramid, boxes = pyramid_of(2), boxes_of(2, 8)
    valid = np.arange(16).reshape(2, 8) % 5 > 0
    image = np.repeat([0, 1], 8)
    levels = np.asarray(roi_levels(boxes)).ravel()
    assert set(levels) == {0, 1, 2, 3}

    def whole(pyramid):
        return pyramid_roi_align(
            pyramid, boxes, output_size=3, valid=valid, implementation=implementation
        )

    def by_level(pyramid):
        out = 0
        for level, (features, stride) in enumerate(zip(pyramid, STRIDES, strict=True)):
            out += roi_align(
                features,
                boxes.reshape(16, 4),
                image,
                output_size=3,
                spatial_scale=1 / stride,
                valid=valid.ravel() & (levels == level),
                implementation="gather",
            )
        return out.reshape(2, 8, 3, 3, 2)

    dy = normal(0, 2, 8, 3, 3, 2)
    actual, expected = (value_and_vjp(f, (pyramid,), dy) for f in (whole, by_level))
    assert tree_relative_error(actual, expected) < 1e-5
    assert (actual[0][~valid] == 0).all()


@pytest.mark.parametrize("implementation", ["gather", "einsum"])
def test_an_image_does_not_see_the_others(implementation):
    pyramid, boxes = pyramid_of(3), boxes_of(3, 4)
    align = jax.jit(
        lambda p, b: pyramid_roi_align(p, b, output_size=2, implementation=implementation)
    )
    together = align(pyramid, boxes)
    alone = align([f[1:2] for f in pyramid], boxes[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-6)


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match=r"one map .* for each stride"):
        pyramid_roi_align(pyramid_of(2)[:3], boxes_of(2, 4), output_size=2)
    with pytest.raises(ValueError, match=r"one map .* for each stride"):
        pyramid_roi_align(pyramid_of(1), boxes_of(2, 4), output_size=2)
    with pytest.raises(ValueError, match=r"consecutive powers of two, received \(4, 16\)"):
        roi_levels(random_boxes(0, 3), strides=(4, 16))
