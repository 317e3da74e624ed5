"""The second stage of two-stage detection: from proposals to detections."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from wsbcn_flax.ops.detection import (
    BoxConvention,
    class_nms,
    decode_boxes,
    encode_boxes,
    match_boxes,
    sample_matches,
)
from wsbcn_flax.tasks._proposals import Boxes, LossSum, clip, is_at_least, smooth_l1

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class Regions(NamedTuple):
    """Proposals sampled in each image, the positive ones first, and their targets.

    Attributes:
        boxes: Boxes [B, S, 4], xyxy in pixels.
        valid: Whether each slot is used [B, S].
        positive: Whether each slot holds an object [B, S].
        labels: Classes [B, S] from 1, or 0 for the background.
        truth: Indices [B, S] of the objects' annotations.
        targets: Deltas [B, S, 4] of the annotated boxes.
    """

    boxes: jax.Array
    valid: jax.Array
    positive: jax.Array
    labels: jax.Array
    truth: jax.Array
    targets: jax.Array


def sample_regions(
    proposals: Boxes,
    truth: Boxes,
    labels: jax.Array,
    keys: jax.Array,
    *,
    samples: int,
    convention: BoxConvention,
) -> Regions:
    """Samples proposals and annotated boxes in each image, a quarter of them positive at most.

    Args:
        proposals: Proposals of the first stage.
        truth: Annotated boxes, which join the proposals.
        labels: Classes of the annotated boxes [B, G], from 1.
        keys: Keys of the samples [B].
        samples: Number of regions of an image.
        convention: Convention of boxes.
    """
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), proposals, truth)

    def one_image(candidates, truth, labels, key):
        matched = match_boxes(
            candidates.boxes,
            truth.boxes,
            positive_iou=0.5,
            negative_iou=0.5,
            valid=truth.valid,
            reference_valid=candidates.valid,
            convention=convention,
        )
        sample = sample_matches(
            key,
            matched.positive,
            matched.negative,
            size=samples,
            max_positives=samples // 4,
        )
        boxes, index = candidates.boxes[sample.index], matched.index[sample.index]
        targets = encode_boxes(
            truth.boxes[index], boxes, weights=BOX_WEIGHTS, convention=convention
        )
        label = jnp.where(sample.positive, labels[index], 0)
        return Regions(boxes, sample.valid, sample.positive, label, index, targets)

    return jax.vmap(one_image)(joined, truth, labels, keys)


def box_losses(
    logits: jax.Array, deltas: jax.Array, regions: Regions, *, convention: BoxConvention
) -> tuple[LossSum, LossSum]:
    """Computes the losses of classes (logits [B, S, K + 1]) and boxes (deltas [B, S, K + 1, 4])."""
    error = optax.softmax_cross_entropy_with_integer_labels(logits, regions.labels)
    deltas = of_label(jnp.moveaxis(deltas, 2, 3), regions.labels)
    distance = jnp.sum(smooth_l1(deltas - regions.targets, beta=convention.box_beta), axis=-1)
    count = jnp.sum(regions.valid, axis=1)
    return (
        LossSum(jnp.sum(error, axis=1, where=regions.valid), count),
        LossSum(jnp.sum(distance, axis=1, where=regions.positive), count),
    )


def mask_loss(
    logits: jax.Array, targets: jax.Array, labels: jax.Array, positive: jax.Array
) -> LossSum:
    """Computes the loss of masks from logits [B, P, M, M, K + 1] and targets [B, P, M, M]."""
    # Other targets may be NaN, whose gradient is NaN however small a share it has in the loss.
    targets = jnp.where(positive[:, :, None, None], targets, 0)
    error = optax.sigmoid_binary_cross_entropy(of_label(logits, labels), targets)
    total = jnp.sum(jnp.mean(error, axis=(2, 3)), axis=1, where=positive)
    return LossSum(total, jnp.sum(positive, axis=1))


class Detections(NamedTuple):
    """The objects detected in each image, in order of decreasing score.

    Attributes:
        boxes: Boxes [B, D, 4], xyxy in pixels.
        scores: Probabilities [B, D] of the classes.
        labels: Classes [B, D], from 1.
        valid: Whether each slot holds an object [B, D].
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    valid: jax.Array


def select_detections(
    logits: jax.Array,
    deltas: jax.Array,
    proposals: Boxes,
    image_hw: jax.Array,
    *,
    count: int,
    score_threshold: float,
    iou_threshold: float,
    convention: BoxConvention,
) -> Detections:
    """Decodes every class of every proposal, suppresses duplicates of a class, keeps the best.

    Args:
        logits: Class logits [B, N, K + 1], the background first.
        deltas: Deltas for each class [B, N, K + 1, 4].
        proposals: Proposals [B, N] that the logits and deltas belong to.
        image_hw: Heights and widths of the images [B, 2], in pixels.
        count: Number of detections for each image.
        score_threshold: Probability that a detection must exceed.
        iou_threshold: Largest IoU of two detections of one class.
        convention: Convention of boxes.
    """
    scores, deltas = jax.nn.softmax(logits)[..., 1:], deltas[:, :, 1:]
    references = jnp.broadcast_to(proposals.boxes[:, :, None], deltas.shape)
    boxes = decode_boxes(deltas, references, weights=BOX_WEIGHTS, convention=convention)
    boxes = clip(boxes, image_hw, convention)
    valid = proposals.valid[..., None] & (scores > score_threshold)
    valid &= is_at_least(boxes, 1e-2, convention)

    def suppress(boxes, scores, valid):
        options = {"iou_threshold": iou_threshold, "convention": convention}
        return class_nms(boxes, scores, valid=valid, **options)

    images, _, classes = scores.shape
    best = jnp.where(jax.vmap(suppress)(boxes, scores, valid), scores, 0).reshape(images, -1)
    best, index = lax.top_k(best, min(count, best.shape[1]))
    boxes = jnp.take_along_axis(boxes.reshape(images, -1, 4), index[..., None], 1)
    return Detections(boxes, best, index % classes + 1, best > 0)


def of_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Selects from values [B, N, ..., K + 1] those of each region's label [B, N]."""
    labels = labels.reshape(labels.shape + (1,) * (values.ndim - 2))
    return jnp.squeeze(jnp.take_along_axis(values, labels, axis=-1), axis=-1)
