"""Mask targets: exact shapes, an ellipse, and torchvision's adaptive RoIAlign as a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_oracles import random_boxes
from detection_oracles import roi_align as looped_roi_align

from wsbcn_flax.ops.detection import AUTHORS, bitmap_targets, mask_targets

BOXES = np.array([[10, 20, 90, 60], [5, 5, 45, 95]], np.float32)
ROIS = np.array(
    [[8, 15, 80, 66], [30, 20, 120, 50], [0, 0, 50, 100], [10, 30, 30, 90], [60, 0, 95, 40]],
    np.float32,
)
INDEX = np.array([0, 0, 1, 1, 0])


def ellipse(x, y, box):
    """Whether points are inside the ellipse that fills a box."""
    (x1, y1, x2, y2) = box
    return (2 * (x - x1) / (x2 - x1) - 1) ** 2 + (2 * (y - y1) / (y2 - y1) - 1) ** 2 <= 1


def grid(box, size):
    """Returns the centers of a box's bins: x along columns, y along rows."""
    center = (np.arange(size) + 0.5) / size
    return np.meshgrid(*(box[i] + center * (box[i + 2] - box[i]) for i in (0, 1)))


def test_a_full_mask_is_the_box():
    full = np.ones((2, 112, 112), np.uint8)
    targets = mask_targets(full, BOXES, ROIS, INDEX)
    for target, roi, box in zip(targets, ROIS, BOXES[INDEX], strict=True):
        x, y = grid(roi, 28)
        expected = (box[0] <= x) & (x <= box[2]) & (box[1] <= y) & (y <= box[3])
        np.testing.assert_array_equal(target, expected)


def test_an_ellipse_is_nearly_what_is_rasterized_on_the_grid():
    masks = np.stack([ellipse(*grid(box, 112), box) for box in BOXES]).astype(np.uint8)
    targets = np.asarray(mask_targets(masks, BOXES, ROIS, INDEX))
    expected = np.stack([ellipse(*grid(r, 28), b) for r, b in zip(ROIS, BOXES[INDEX], strict=True)])
    assert (targets != expected).mean() < 0.0065  # The share of pixels that differ on COCO.
    coarse = np.stack([ellipse(*grid(box, 28), box) for box in BOXES]).astype(np.uint8)
    assert (np.asarray(mask_targets(coarse, BOXES, ROIS, INDEX)) != expected).mean() > 0.0065
    assert 0.2 < targets.mean() < 0.8


def test_a_mask_on_its_own_grid_is_itself():
    masks = np.random.default_rng(0).integers(0, 2, (2, 28, 28), np.uint8)
    np.testing.assert_array_equal(mask_targets(masks, BOXES, BOXES, np.arange(2)), masks)


def test_authors_boxes_include_their_last_pixel():
    full, box = np.ones((1, 28, 28), np.uint8), np.array([[0, 0, 9, 9]], np.float32)
    roi, index = np.array([[0, 0, 20, 20]], np.float32), np.array([0])
    for convention, expected in (({}, 9), ({"convention": AUTHORS}, 10)):
        target = mask_targets(full, box, roi, index, size=20, **convention)
        assert target[0, 0].sum() == expected


def test_a_degenerate_box_has_an_empty_target():
    masks = np.ones((2, 28, 28), np.uint8)
    flat = np.array([[5.2, 5.2, 5.2, 5.2], [9, 9, 5, 5]], np.float32)
    targets = mask_targets(masks, flat, np.array([[0, 0, 28, 28]] * 2, np.float32), np.arange(2))
    assert (targets == 0).all()


@pytest.mark.parametrize("kind", ["frames", "bitmaps"])
def test_invalid_rois_are_zero_and_images_map(kind):
    masks = np.ones((2, 28, 28), np.uint8)
    valid = np.array([True, False, True, True, False])

    def target(rois, valid):
        if kind == "frames":
            return mask_targets(masks, BOXES, rois, INDEX, valid=valid)
        return bitmap_targets(masks, rois / 4, INDEX, valid=valid)

    padded = np.where(valid[:, None], ROIS, np.nan)
    mapped = jax.jit(jax.vmap(target))(np.stack([ROIS, padded]), np.stack([valid | True, valid]))
    assert (mapped[1, ~valid] == 0).all()
    np.testing.assert_array_equal(mapped[1, valid], mapped[0, valid])
    assert (mapped[0, ~valid] > 0).any()


def test_bitmap_targets_equal_a_loop_with_adaptive_samples():
    bitmaps = (np.random.default_rng(0).random((2, 40, 50)) < 0.5).astype(np.uint8)
    rois = np.clip(random_boxes(1, 6, extent=40, side=20), 0, 40)
    rois[0] = [0, 0, 50, 40]
    rois[1] = [3, 3, 3, 3]
    index = np.arange(6) % 2
    targets = jax.jit(lambda *a: bitmap_targets(*a, size=7))(bitmaps, rois, index)
    for target, roi, i in zip(targets, rois, index, strict=True):
        image = bitmaps[i][..., None]
        loop = looped_roi_align(image, roi, 7, spatial_scale=1, samples=None, aligned=False)
        np.testing.assert_allclose(target, loop[..., 0], atol=1e-4)
        assert (target > 1e-3).any()


@pytest.mark.parametrize("side", [84, 85, 196])
def test_a_roi_may_be_as_large_as_its_bitmap(side):
    """Jitted, 84 / 28 may be a little more than 3: XLA multiplies by 1 / 28."""
    targets = jax.jit(bitmap_targets)(
        jnp.ones((1, side, side)), jnp.float32([[0, 0, side, side]]), jnp.array([0])
    )
    np.testing.assert_allclose(targets, 1, atol=1e-5)


def test_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match=r"masks must have shape \[G, M, M\], .* \(1, 28, 28\)"):
        mask_targets(np.ones((1, 28, 28)), BOXES, ROIS, INDEX)
    with pytest.raises(ValueError, match=r"bitmaps must have shape \[G, H, W\], received \(3, 4\)"):
        bitmap_targets(jnp.ones((3, 4)), ROIS, INDEX)
