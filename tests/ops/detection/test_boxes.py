"""Areas, IoU and clipping: torchvision, a plain loop, degenerate boxes, both conventions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_oracles import golden, iou, random_boxes

from wsbcn_flax.ops.detection import (
    AUTHORS,
    TORCHVISION,
    box_area,
    box_iou,
    clip_boxes,
    trained_anchors,
)

DEGENERATE = np.array(
    [[5, 5, 5, 5], [5, 5, 5, 9], [9, 9, 5, 5], [9, 5, 5, 9], [0, 0, 1e4, 1e4]], np.float32
)


def test_iou_equals_torchvision():
    expected = golden("iou")
    actual = box_iou(jnp.asarray(expected["_a"]), jnp.asarray(expected["_b"]))
    np.testing.assert_allclose(actual, expected[""], atol=1e-5)


@pytest.mark.parametrize("convention", [AUTHORS, TORCHVISION])
def test_iou_equals_a_loop_over_pairs(convention):
    a, b = random_boxes(0, 12), np.concatenate([random_boxes(1, 8), DEGENERATE])
    expected = [[iou(x, y, convention.pixel) for y in b] for x in a]
    np.testing.assert_allclose(box_iou(a, b, convention=convention), expected, atol=1e-6)


def test_conventions_differ_in_iou_and_area():
    a, b = random_boxes(0, 5), random_boxes(1, 5)
    assert abs(box_iou(a, b) - box_iou(a, b, convention=AUTHORS)).max() > 1e-3
    np.testing.assert_allclose(
        box_area(a, convention=AUTHORS) - box_area(a),
        (a[:, 2] - a[:, 0]) + (a[:, 3] - a[:, 1]) + 1,
        rtol=1e-4,
    )


@pytest.mark.parametrize("convention", [AUTHORS, TORCHVISION])
def test_degenerate_boxes_have_finite_iou_and_gradients(convention):
    def total(a, b):
        return box_iou(a, b, convention=convention).sum()

    ious = box_iou(DEGENERATE, DEGENERATE, convention=convention)
    gradients = jax.grad(total, (0, 1))(jnp.asarray(DEGENERATE), jnp.asarray(DEGENERATE))
    chex.assert_tree_all_finite((ious, gradients))
    assert (ious[2:4] == 0).all()  # Corners out of order.


def test_iou_of_no_boxes_is_empty():
    assert box_iou(jnp.zeros((0, 4)), jnp.zeros((3, 4))).shape == (0, 3)


def test_boxes_are_float32_at_least(x64):
    assert box_iou(jnp.ones((1, 4), jnp.bfloat16), jnp.ones((1, 4), jnp.int32)).dtype == "float32"
    assert box_area(jnp.ones((1, 4), jnp.float64)).dtype == "float64"


def test_clipping_to_the_image():
    boxes = random_boxes(2, 20)
    for convention, last in ((TORCHVISION, 0), (AUTHORS, 1)):
        expected = np.clip(boxes, 0, np.array([70, 50, 70, 50]) - last)
        np.testing.assert_array_equal(clip_boxes(boxes, (50, 70), convention=convention), expected)


def test_clipping_maps_over_images():
    boxes = jnp.asarray(random_boxes(2, 6)).reshape(2, 3, 4)
    sizes = jnp.array([[50, 70], [30, 20]])
    clipped = jax.jit(jax.vmap(clip_boxes))(boxes, sizes)
    np.testing.assert_array_equal(clipped[1], clip_boxes(boxes[1], (30, 20)))


def test_authors_train_only_anchors_inside_the_image():
    anchors = np.array([[0, 0, 19, 9], [0, 0, 20, 9], [0, -1, 5, 5], [0, 0, 5, 10]], np.float32)
    assert trained_anchors(anchors, (10, 20), convention=AUTHORS).tolist() == [True, *[False] * 3]
    assert trained_anchors(anchors, (10, 20)).all()


def test_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match=r"a must have shape \[N, 4\], received \(2, 3, 4\)"):
        box_iou(jnp.zeros((2, 3, 4)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"boxes must have shape \[..., 4\], received \(2, 5\)"):
        box_area(jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"a height and a width, received shape \(3, 2\)"):
        clip_boxes(jnp.zeros((3, 4)), jnp.zeros((3, 2)))
