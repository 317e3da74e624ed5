"""Matching: torchvision's rule in plain NumPy, padding, ties and blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_oracles import iou, random_boxes

from wsbcn_flax.ops.detection import AUTHORS, TORCHVISION, _matcher, match_boxes

RPN = {"positive_iou": 0.7, "negative_iou": 0.3, "low_quality": True}
BOX_HEAD = {"positive_iou": 0.5, "negative_iou": 0.5}


def looped_match(references, boxes, positive_iou, negative_iou, low_quality=False, pixel=0):
    overlaps = np.array([[iou(r, b, pixel) for b in boxes] for r in references])
    positive = overlaps.max(1) >= positive_iou
    if low_quality:
        positive |= (np.isclose(overlaps, overlaps.max(0), 1e-6, 0)).any(1)
    return overlaps.argmax(1), positive, (overlaps.max(1) < negative_iou) & ~positive


@pytest.mark.parametrize("convention", [AUTHORS, TORCHVISION])
@pytest.mark.parametrize("rule", [RPN, BOX_HEAD])
def test_equals_a_loop(rule, convention):
    boxes = random_boxes(0, 6, side=40)
    references = np.concatenate([random_boxes(1, 80), boxes + np.float32([3, 2, 0, 1])])
    expected = looped_match(references, boxes, **rule, pixel=convention.pixel)
    actual = match_boxes(references, boxes, **rule, convention=convention)
    for array, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(array, other)
    ignored = ~(actual.positive | actual.negative)
    assert ignored.any() == (rule is RPN)
    assert actual.positive.any()


@pytest.mark.parametrize("block", [7, 30, 1000])
def test_blocks_do_not_change_the_result(block, monkeypatch):
    boxes, references = random_boxes(0, 6), random_boxes(1, 90)
    expected = match_boxes(references, boxes, **RPN)
    monkeypatch.setattr(_matcher, "_BLOCK", block)
    for array, other in zip(match_boxes(references, boxes, **RPN), expected, strict=True):
        np.testing.assert_array_equal(array, other)


def test_all_references_that_tie_are_positive():
    """A ground-truth box lies halfway between two anchors; a third anchor is worse."""
    boxes = np.array([[4, 0, 12, 8]], np.float32)
    references = np.array([[0, 0, 8, 8], [8, 0, 16, 8], [10, 0, 18, 8]], np.float32)
    assert match_boxes(references, boxes, **RPN).positive.tolist() == [True, True, False]
    without = match_boxes(references, boxes, positive_iou=0.7, negative_iou=0.3)
    assert not without.positive.any()


def test_ground_truth_that_nothing_overlaps_has_no_positives():
    matches = match_boxes(random_boxes(0, 20), np.array([[1e4, 1e4, 2e4, 2e4]]), **RPN)
    assert not matches.positive.any()
    assert matches.negative.all()


@pytest.mark.parametrize("rule", [RPN, BOX_HEAD])
def test_padding_does_not_change_the_result(rule):
    boxes, references = random_boxes(0, 4), random_boxes(1, 50)
    padded = np.concatenate([boxes, references[:3], np.zeros((2, 4), np.float32)])
    expected = match_boxes(references, boxes, **rule)
    actual = match_boxes(references, padded, **rule, valid=np.arange(9) < 4)
    for array, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(array, other)
    unmasked = match_boxes(references, padded, **rule)
    assert (unmasked.positive != expected.positive).any()


def test_without_ground_truth_all_is_background():
    matches = match_boxes(random_boxes(1, 9), jnp.zeros((3, 4)), **RPN, valid=np.zeros(3, bool))
    assert matches.negative.all()
    assert not matches.positive.any()


def test_invalid_references_have_no_flag_and_are_nobodys_best():
    boxes = np.array([[0, 0, 10, 10]], np.float32)
    references = np.array([[0, 0, 10, 9], [0, 0, 10, 5], [50, 50, 60, 60]], np.float32)
    valid = np.array([False, True, False])
    matches = match_boxes(references, boxes, **RPN, reference_valid=valid)
    assert matches.positive.tolist() == [False, True, False]
    assert not matches.negative.any()


def test_maps_over_images():
    boxes = random_boxes(0, 12).reshape(3, 4, 4)
    valid = np.arange(4) < np.array([[4], [1], [0]])
    references = random_boxes(1, 30)

    def match(boxes, valid):
        return match_boxes(references, boxes, **RPN, valid=valid)

    mapped = jax.jit(jax.vmap(match))(boxes, valid)
    for i in range(3):
        for array, other in zip(mapped, match(boxes[i], valid[i]), strict=True):
            np.testing.assert_array_equal(array[i], other)


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="at least one slot"):
        match_boxes(jnp.zeros((3, 4)), jnp.zeros((0, 4)), **RPN)
    with pytest.raises(ValueError, match=r"received 0\.5 and 0\.3"):
        match_boxes(jnp.zeros((3, 4)), jnp.zeros((1, 4)), positive_iou=0.3, negative_iou=0.5)
