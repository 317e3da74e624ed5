"""The two stages of detection against plain loops over boxes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from wsbcn_flax.ops.detection import AUTHORS, TORCHVISION, box_iou, decode_boxes, encode_boxes
from wsbcn_flax.tasks._proposals import (
    Anchors,
    Boxes,
    LossSum,
    make_anchors,
    proposal_losses,
    select_proposals,
)
from wsbcn_flax.tasks._regions import (
    BOX_WEIGHTS,
    Regions,
    box_losses,
    mask_loss,
    sample_regions,
    select_detections,
)

IMAGE_HW = jnp.array([[60, 50], [40, 64]])
boxes_at = functools.partial(jnp.asarray, dtype=jnp.float32)


def random_boxes(seed, *shape):
    corner, sides = normal(seed, *shape, 2) * 12 + 25, abs(normal(seed + 1, *shape, 2)) * 15 + 5
    return jnp.concatenate([corner, corner + sides], -1)


def greedy(boxes, scores, threshold):
    """Returns the indices that non-maximum suppression keeps, the best first."""
    kept = []
    for index in np.argsort(-scores):
        overlap = [float(box_iou(boxes[index][None], boxes[other][None])[0, 0]) for other in kept]
        if all(iou <= threshold for iou in overlap):
            kept.append(index)
    return kept


def clipped(boxes, image_hw):
    height, width = np.asarray(image_hw)
    return np.clip(boxes, 0, [width, height, width, height])


def first_stage(images=2):
    """Makes outputs and anchors of two levels; some anchors of the second are not valid."""
    anchors = [
        Anchors(np.asarray(random_boxes(seed, count)), jnp.ones((images, count), bool))
        for seed, count in [(1, 12), (3, 7)]
    ]
    anchors[1] = anchors[1]._replace(valid=anchors[1].valid.at[:, 5:].set(False))
    outputs = [
        (normal(5 + i, images, len(a.boxes)), 0.1 * normal(7 + i, images, len(a.boxes), 4))
        for i, a in enumerate(anchors)
    ]
    return outputs, anchors


def test_proposals_are_the_best_of_each_level_without_duplicates():
    outputs, anchors = first_stage()
    proposals = select_proposals(
        outputs,
        anchors,
        IMAGE_HW,
        per_level=6,
        count=8,
        iou_threshold=0.3,
        convention=TORCHVISION,
    )
    for image in range(2):
        found = []
        for (logits, deltas), level in zip(outputs, anchors, strict=True):
            scores = np.where(level.valid[image], logits[image], -np.inf)
            best = [i for i in np.argsort(-scores)[:6] if scores[i] > -np.inf]
            boxes = np.asarray(decode_boxes(deltas[image], jnp.asarray(level.boxes)))
            boxes = clipped(boxes, IMAGE_HW[image])
            best = [i for i in best if np.all(boxes[i, 2:] > boxes[i, :2])]  # Not empty.
            boxes = boxes[best]
            kept = greedy(jnp.asarray(boxes), scores[best], 0.3)
            found += [(scores[best][i], boxes[i]) for i in kept]
        found = sorted(found, key=lambda pair: -pair[0])[:8]
        valid = np.asarray(proposals.valid[image])
        assert valid.sum() == len(found)
        expected = np.stack([box for _, box in found])
        np.testing.assert_allclose(proposals.boxes[image][valid], expected, rtol=1e-5, atol=1e-4)


def test_proposals_of_one_image_depend_on_the_others_only_per_device():
    outputs, anchors = first_stage()
    outputs[0] = (outputs[0][0].at[1].add(9.0), outputs[0][1])  # The second image scores higher.
    of_first = jax.tree.map(lambda x: x[:1], outputs)
    valid = [a._replace(valid=a.valid[:1]) for a in anchors]
    options = {"per_level": 6, "count": 5, "iou_threshold": 0.7, "convention": TORCHVISION}
    alone = select_proposals(of_first, valid, IMAGE_HW[:1], **options)
    both = select_proposals(outputs, anchors, IMAGE_HW, **options)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), alone, both)
    shared = select_proposals(outputs, anchors, IMAGE_HW, **options, per_device=True)
    assert int(both.valid.sum()) == 10
    assert int(shared.valid.sum()) == 5
    assert int(shared.valid[1].sum()) > int(shared.valid[0].sum())


@pytest.mark.parametrize(
    ("size", "leave_out", "expected"), [(32, False, 48), (32, True, 12), (64, True, 48)]
)
def test_anchors_of_the_padding_are_left_out(size, leave_out, expected):
    levels = [jnp.zeros((1, 16 // 2**i, 16 // 2**i, 1)) for i in range(5)]
    anchors = make_anchors(
        levels,
        jnp.array([[size, size]]),
        sizes=(8, 16, 32, 64, 128),
        convention=TORCHVISION,
        leave_out_padding=leave_out,
    )
    assert [len(each.boxes) for each in anchors] == [768, 192, 48, 12, 3]
    assert int(anchors[2].valid.sum()) == expected


def test_losses_of_the_first_stage():
    """There are more samples than anchors, so the sample is not random."""
    references = np.asarray([[0, 0, 20, 20], [30, 30, 50, 50], [2, 0, 20, 20]], np.float32)
    anchors = [Anchors(references, jnp.ones((1, 3), bool))]
    logits, deltas = jnp.array([[0.5, -1.0, 2.0]]), normal(1, 1, 3, 4)
    truth = Boxes(boxes_at([[[0, 0, 20, 20], [9, 9, 9, 9]]]), jnp.array([[True, False]]))
    objectness, boxes = proposal_losses(
        [(logits, deltas)],
        anchors,
        truth,
        jnp.array([[60, 60]]),
        jax.random.split(jax.random.key(0), 1),
        samples=6,
        convention=TORCHVISION,
    )
    # The first and third anchors overlap the object with IoU 1 and 0.9, the second with 0.
    signs = np.array([1, -1, 1])
    expected = np.log1p(np.exp(-signs * logits[0])).sum()
    assert (float(objectness.total[0]), int(objectness.samples[0])) == pytest.approx((expected, 3))
    targets = encode_boxes(jnp.broadcast_to(truth.boxes[0, 0], (3, 4)), jnp.asarray(references))
    error = abs(np.asarray(deltas[0] - targets)[[0, 2]])
    smooth = np.where(error < 1 / 9, 4.5 * error**2, error - 1 / 18).sum()
    assert float(boxes.total[0]) == pytest.approx(smooth, rel=1e-5)


def test_regions_are_proposals_and_annotated_boxes():
    """Regions that overlap an object by half come first, at most a quarter; then background."""
    near, far = [0, 0, 20, 18], [40, 40, 60, 60]
    proposals = Boxes(boxes_at([[near, far, far, near]]), jnp.array([[True, True, True, False]]))
    truth = Boxes(boxes_at([[[9, 9, 9, 9], [0, 0, 20, 20]]]), jnp.array([[False, True]]))
    regions = sample_regions(
        proposals,
        truth,
        jnp.array([[9, 5]]),
        jax.random.split(jax.random.key(0), 1),
        samples=8,
        convention=TORCHVISION,
    )
    assert regions.valid[0].tolist() == [True] * 4 + [False] * 4
    assert regions.positive[0].tolist() == [True, True] + [False] * 6
    assert regions.labels[0].tolist() == [5, 5] + [0] * 6
    assert regions.truth[0, :2].tolist() == [1, 1]
    assert sorted(regions.boxes[0, :2].tolist()) == [near, [0, 0, 20, 20]]
    assert regions.boxes[0, 2:4].tolist() == [far, far]
    decoded = decode_boxes(regions.targets[0, :2], regions.boxes[0, :2], weights=BOX_WEIGHTS)
    np.testing.assert_allclose(decoded, [[0, 0, 20, 20]] * 2, atol=1e-4)


def test_losses_of_the_second_stage():
    logits, deltas = normal(1, 1, 3, 4), normal(2, 1, 3, 4, 4)
    regions = Regions(
        boxes=jnp.zeros((1, 3, 4)),
        valid=jnp.array([[True, True, False]]),
        positive=jnp.array([[True, False, False]]),
        labels=jnp.array([[2, 0, 0]]),
        truth=jnp.zeros((1, 3), int),
        targets=normal(3, 1, 3, 4),
    )
    classes, boxes = box_losses(logits, deltas, regions, convention=AUTHORS)
    chances = np.asarray(jax.nn.softmax(logits[0]))
    assert float(classes.total[0]) == pytest.approx(-np.log(chances[[0, 1], [2, 0]]).sum())
    error = abs(np.asarray(deltas[0, 0, 2] - regions.targets[0, 0]))
    smooth = np.where(error < 1, error**2 / 2, error - 0.5).sum()
    assert float(boxes.total[0]) == pytest.approx(smooth, rel=1e-5)
    assert int(classes.samples[0]) == int(boxes.samples[0]) == 2

    masks, targets = normal(4, 1, 3, 2, 2, 4), jnp.ones((1, 3, 2, 2))
    loss = mask_loss(masks, targets, regions.labels, regions.positive)
    expected = np.log1p(np.exp(-np.asarray(masks[0, 0, :, :, 2]))).mean()
    assert float(loss.total[0]) == pytest.approx(expected, rel=1e-5)
    assert int(loss.samples[0]) == 1


def test_losses_are_normalized_per_image_or_per_device():
    loss = LossSum(jnp.array([6.0, 1.0, 0.0]), jnp.array([3, 1, 0]))
    assert float(loss.mean(per_device=False)) == 1.0
    assert float(loss.mean(per_device=True)) == 1.75


@pytest.mark.parametrize("pixel", [0, 1])
def test_detections_are_the_best_of_every_class_without_duplicates(pixel):
    convention = dataclasses.replace(TORCHVISION, pixel=pixel)
    logits, deltas = 2 * normal(1, 2, 9, 4), normal(2, 2, 9, 4, 4)
    proposals = Boxes(random_boxes(5, 2, 9), jnp.arange(9)[None] < jnp.array([[9], [6]]))
    found = select_detections(
        logits,
        deltas,
        proposals,
        IMAGE_HW,
        count=10,
        score_threshold=0.1,
        iou_threshold=0.4,
        convention=convention,
    )
    for image in range(2):
        expected = []
        chances = np.asarray(jax.nn.softmax(logits[image]))
        for label in (1, 2, 3):
            boxes = decode_boxes(
                deltas[image, :, label],
                proposals.boxes[image],
                weights=BOX_WEIGHTS,
                convention=convention,
            )
            boxes = clipped(boxes, IMAGE_HW[image] - pixel)
            rows = np.flatnonzero(proposals.valid[image] & (chances[:, label] > 0.1))
            # If boxes include their last pixel, overlaps are those of boxes longer by one.
            longer = jnp.asarray(boxes[rows] + np.array([0, 0, pixel, pixel]), jnp.float32)
            for i in greedy(longer, chances[rows, label], 0.4):
                expected.append((chances[rows[i], label], label, boxes[rows[i]]))
        expected = sorted(expected, key=lambda row: -row[0])[:10]
        valid = np.asarray(found.valid[image])
        assert valid.tolist() == [i < len(expected) for i in range(10)]
        scores, labels, boxes = map(np.asarray, zip(*expected, strict=True))
        np.testing.assert_allclose(found.scores[image][valid], scores, rtol=1e-5)
        np.testing.assert_array_equal(found.labels[image][valid], labels)
        np.testing.assert_allclose(found.boxes[image][valid], boxes, rtol=1e-5, atol=1e-4)
