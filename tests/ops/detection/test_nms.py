"""Non-maximum suppression: torchvision, a plain loop, tiles, ties, masks and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_oracles import golden, random_boxes
from detection_oracles import nms as looped_nms

from wsbcn_flax.ops.detection import AUTHORS, TORCHVISION, class_nms, nms

jitted = jax.jit(nms, static_argnames=("iou_threshold", "block", "convention"))


def scores_of(seed, *shape):
    return np.random.default_rng(seed).random(shape, np.float32)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_keeps_torchvisions_indices(case):
    expected = golden(f"nms{case}_")
    scores = expected["scores"]
    keep = np.asarray(jitted(expected["boxes"], scores, iou_threshold=float(expected["threshold"])))
    order = np.argsort(-scores, kind="stable")
    np.testing.assert_array_equal(order[keep[order]], expected["keep"])
    assert 0 < keep.sum() < len(keep)


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
@pytest.mark.parametrize("convention", [AUTHORS, TORCHVISION])
def test_equals_one_box_at_a_time(block, convention):
    boxes, scores = random_boxes(0, 50), scores_of(1, 50)
    expected = looped_nms(boxes, scores, 0.3, convention.pixel)
    actual = jitted(boxes, scores, iou_threshold=0.3, block=block, convention=convention)
    np.testing.assert_array_equal(actual, expected)
    assert 0 < expected.sum() < 50


def test_a_chain_needs_every_pass():
    """Each box overlaps only its neighbours, so every second box survives."""
    start = 4 * np.arange(64, dtype=np.float32)
    boxes = np.stack([start, 0 * start, start + 10, 0 * start + 10], -1)
    keep = jitted(boxes, -start, iou_threshold=0.3, block=32)
    np.testing.assert_array_equal(keep, np.arange(64) % 2 == 0)


def test_kept_boxes_stay_when_suppressed_again():
    boxes, scores = random_boxes(2, 60), scores_of(3, 60)
    once = jitted(boxes, scores, iou_threshold=0.4)
    twice = jitted(boxes, scores, iou_threshold=0.4, valid=once)
    np.testing.assert_array_equal(once, twice)


def test_order_of_the_boxes_does_not_matter():
    boxes, scores = random_boxes(4, 60), scores_of(5, 60)
    shuffled = np.random.default_rng(6).permutation(60)
    keep = jitted(boxes, scores, iou_threshold=0.4)
    again = jitted(boxes[shuffled], scores[shuffled], iou_threshold=0.4)
    np.testing.assert_array_equal(again, keep[shuffled])


def test_of_equal_scores_the_earlier_box_comes_first():
    boxes = np.tile(np.array([[0, 0, 9, 9]], np.float32), (5, 1))
    scores = np.array([0.1, 0.7, 0.7, 0.7, 0.2], np.float32)
    keep = jitted(boxes, scores, iou_threshold=0.5, block=2)
    assert keep.tolist() == [False, True, False, False, False]


def test_an_iou_at_the_threshold_is_kept():
    """As in torchvision, a threshold just below 0.5 is not rounded to 0.5 by float32."""
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5]], np.float32)
    assert jitted(boxes, np.array([1.0, 0.5]), iou_threshold=0.5).all()
    below = float(np.nextafter(0.5, 0))
    assert jitted(boxes, np.array([1.0, 0.5]), iou_threshold=below).tolist() == [True, False]


def test_invalid_boxes_neither_survive_nor_suppress():
    boxes, scores = random_boxes(7, 80), scores_of(8, 80)
    valid = np.random.default_rng(9).random(80) < 0.5
    expected = np.zeros(80, bool)
    expected[valid] = looped_nms(boxes[valid], scores[valid], 0.3)
    boxes[~valid] = np.nan  # Padding may hold anything.
    scores[~valid] = np.inf
    actual = jitted(boxes, scores, iou_threshold=0.3, valid=valid, block=16)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("lowest", [-np.inf, np.nan])
def test_boxes_without_a_finite_score_come_last(lowest):
    """They may even come after invalid boxes, whose blocks are skipped."""
    boxes = np.tile(random_boxes(7, 1), (9, 1))
    scores = np.full(9, lowest, np.float32)
    valid = np.arange(9) >= 6
    keep = jitted(boxes, scores, iou_threshold=0.3, valid=valid, block=2)
    assert np.flatnonzero(keep).tolist() == [6]


def test_no_boxes():
    assert nms(jnp.zeros((0, 4)), jnp.zeros(0), iou_threshold=0.5).shape == (0,)
    nothing = jitted(
        random_boxes(0, 9), scores_of(1, 9), iou_threshold=0.5, valid=np.zeros(9, bool)
    )
    assert not nothing.any()


def test_degenerate_boxes_are_kept():
    boxes = np.array([[5, 5, 5, 5], [5, 5, 5, 5], [9, 9, 5, 5], [0, 0, 20, 20]], np.float32)
    assert jitted(boxes, scores_of(0, 4), iou_threshold=0.5).all()


def test_leading_axes_and_vmap_are_independent_problems():
    boxes = random_boxes(1, 120).reshape(2, 3, 20, 4)
    scores, valid = scores_of(2, 2, 3, 20), scores_of(3, 2, 3, 20) < 0.8
    valid[0, 0] = False
    one = lambda b, s, v: jitted(b, s, iou_threshold=0.2, valid=v, block=8)  # noqa: E731
    expected = [[one(*(a[i, j] for a in (boxes, scores, valid))) for j in range(3)] for i in (0, 1)]
    np.testing.assert_array_equal(one(boxes, scores, valid), expected)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(one))(boxes, scores, valid), expected)


@pytest.mark.parametrize("classes_at_a_time", [1, 2, 3, 5])
def test_classes_do_not_suppress_each_other(classes_at_a_time):
    boxes, scores = random_boxes(3, 60).reshape(20, 3, 4), scores_of(4, 20, 3)
    valid = scores > 0.2
    keep = class_nms(
        boxes,
        scores,
        iou_threshold=0.2,
        valid=valid,
        classes_at_a_time=classes_at_a_time,
        block=8,
    )
    for c in range(3):
        alone = jitted(boxes[:, c], scores[:, c], iou_threshold=0.2, valid=valid[:, c])
        np.testing.assert_array_equal(keep[:, c], alone)
    together = jitted(boxes.reshape(60, 4), scores.reshape(60), iou_threshold=0.2)
    assert together.sum() < keep.sum()


def test_no_gradient_flows():
    def total(boxes, scores):
        keep = nms(boxes, scores, iou_threshold=0.3)
        return jnp.sum(jnp.where(keep, scores, 0)), keep

    boxes, scores = jnp.asarray(random_boxes(5, 10)), jnp.asarray(scores_of(6, 10))
    (to_boxes, to_scores), keep = jax.grad(total, (0, 1), has_aux=True)(boxes, scores)
    assert (to_boxes == 0).all()
    np.testing.assert_array_equal(to_scores, keep.astype(jnp.float32))


def test_bad_arguments_are_errors():
    boxes = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match=r"one score for each box, received \(2,\)"):
        nms(boxes, jnp.zeros(2), iou_threshold=0.5)
    with pytest.raises(ValueError, match="from 0 to 1, received 50"):
        nms(boxes, jnp.zeros(3), iou_threshold=50)
    with pytest.raises(ValueError, match="block must be at least 1, received 0"):
        nms(boxes, jnp.zeros(3), iou_threshold=0.5, block=0)
    with pytest.raises(ValueError, match=r"valid must hold one flag for each row"):
        nms(boxes, jnp.zeros(3), iou_threshold=0.5, valid=jnp.ones(2, bool))
