"""The first stage of two-stage detection: from anchors to proposals."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from wsbcn_flax.models._padding import valid_positions
from wsbcn_flax.ops.detection import (
    BoxConvention,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    match_boxes,
    nms,
    pyramid_anchors,
    sample_matches,
    trained_anchors,
)

STRIDES = (4, 8, 16, 32, 64)


class Boxes(NamedTuple):
    """A fixed number of boxes for each image, some of which are valid.

    Attributes:
        boxes: Boxes [B, N, 4], xyxy in pixels.
        valid: Whether each box is valid [B, N].
    """

    boxes: jax.Array
    valid: jax.Array


class Anchors(NamedTuple):
    """The anchors of one level.

    Attributes:
        boxes: Boxes [A, 4], xyxy in pixels.
        valid: Whether each anchor is used [B, A]; anchors of padding that is left out are not.
    """

    boxes: np.ndarray
    valid: jax.Array


class LossSum(NamedTuple):
    """A loss as its sum over the samples of each image and the number of samples, both [B]."""

    total: jax.Array
    samples: jax.Array

    def mean(self, *, per_device: bool) -> jax.Array:
        """Returns the mean over each image's samples, then over images; or over all samples."""
        if per_device:
            return jnp.sum(self.total) / jnp.maximum(jnp.sum(self.samples), 1)
        return jnp.mean(self.total / jnp.maximum(self.samples, 1))


def make_anchors(
    levels: Sequence[jax.Array],
    image_hw: jax.Array,
    *,
    sizes: Sequence[float],
    convention: BoxConvention,
    leave_out_padding: bool,
) -> list[Anchors]:
    """Makes the anchors of a pyramid with levels [B, H, W, C]."""
    level_hw = [(level.shape[1], level.shape[2]) for level in levels]
    boxes = pyramid_anchors(level_hw, strides=STRIDES, sizes=sizes, convention=convention)
    anchors = []
    for level, stride, of_level in zip(level_hw, STRIDES, boxes, strict=True):
        valid = valid_positions(image_hw, level, (stride, stride)) | (not leave_out_padding)
        valid = valid.reshape(len(image_hw), -1)
        valid = jnp.repeat(valid, len(of_level) // valid.shape[1], axis=1)
        anchors.append(Anchors(of_level, valid))
    return anchors


def proposal_losses(
    outputs: Sequence[tuple[jax.Array, jax.Array]],
    anchors: Sequence[Anchors],
    truth: Boxes,
    image_hw: jax.Array,
    keys: jax.Array,
    *,
    samples: int,
    convention: BoxConvention,
) -> tuple[LossSum, LossSum]:
    """Computes the losses of objectness and boxes, on anchors sampled in each image.

    Args:
        outputs: Objectness logits [B, A] and deltas [B, A, 4] of each level.
        anchors: Anchors of each level.
        truth: Annotated boxes.
        image_hw: Heights and widths of the images [B, 2], in pixels.
        keys: Keys of the samples [B].
        samples: Number of anchors sampled in an image; at most half are positive.
        convention: Convention of boxes.
    """
    logits, deltas = (jnp.concatenate(parts, 1) for parts in zip(*outputs, strict=True))
    boxes = jnp.concatenate([each.boxes for each in anchors])
    valid = jnp.concatenate([each.valid for each in anchors], 1)

    def one_image(logits, deltas, valid, truth, hw, key):
        matched = match_boxes(
            boxes,
            truth.boxes,
            positive_iou=0.7,
            negative_iou=0.3,
            low_quality=True,
            valid=truth.valid,
            reference_valid=valid,
            convention=convention,
        )
        trained = trained_anchors(boxes, hw, convention=convention)
        sample = sample_matches(
            key,
            matched.positive & trained,
            matched.negative & trained,
            size=samples,
            max_positives=samples // 2,
        )
        chosen = sample.index
        error = optax.sigmoid_binary_cross_entropy(logits[chosen], sample.positive)
        references, objects = boxes[chosen], truth.boxes[matched.index[chosen]]
        target = encode_boxes(objects, references, convention=convention)
        distance = jnp.sum(smooth_l1(deltas[chosen] - target, beta=1 / 9), axis=-1)
        return (
            jnp.sum(error, where=sample.valid),
            jnp.sum(distance, where=sample.positive),
            jnp.sum(sample.valid),
        )

    error, distance, sampled = jax.vmap(one_image)(logits, deltas, valid, truth, image_hw, keys)
    return LossSum(error, sampled), LossSum(distance, sampled)


def select_proposals(
    outputs: Sequence[tuple[jax.Array, jax.Array]],
    anchors: Sequence[Anchors],
    image_hw: jax.Array,
    *,
    per_level: int,
    count: int,
    iou_threshold: float,
    convention: BoxConvention,
    per_device: bool = False,
) -> Boxes:
    """Decodes the best anchors of each level, suppresses duplicates and keeps the best overall.

    Args:
        outputs: Objectness logits [B, A] and deltas [B, A, 4] of each level.
        anchors: Anchors of each level.
        image_hw: Heights and widths of the images [B, 2], in pixels.
        per_level: Number of anchors that are decoded in each level.
        count: Number of proposals for each image.
        iou_threshold: Largest IoU of two proposals from one level.
        convention: Convention of boxes.
        per_device: Whether ``count`` is the number for all images together; the proposals of one
            image then depend on the other images.
    """
    boxes, scores = [], []
    for (logits, deltas), references in zip(outputs, anchors, strict=True):
        # One level at a time: XLA for TPU takes 20 seconds to compile a sort of all anchors.
        logits = jnp.where(references.valid, logits, -jnp.inf)
        score, index = lax.top_k(logits, min(per_level, logits.shape[1]))
        deltas = jnp.take_along_axis(deltas, index[..., None], 1)
        decoded = decode_boxes(deltas, jnp.asarray(references.boxes)[index], convention=convention)
        decoded = clip(decoded, image_hw, convention)
        valid = (score > -jnp.inf) & is_at_least(decoded, 1e-3, convention)
        keep = nms(decoded, score, iou_threshold=iou_threshold, valid=valid, convention=convention)
        boxes.append(decoded)
        scores.append(jnp.where(keep, score, -jnp.inf))
    boxes, scores = jnp.concatenate(boxes, 1), jnp.concatenate(scores, 1)
    count = min(count, scores.shape[1])
    if per_device:
        threshold = lax.top_k(scores.reshape(-1), count)[0][-1]
        scores = jnp.where(scores >= threshold, scores, -jnp.inf)
    score, index = lax.top_k(scores, count)
    return Boxes(jnp.take_along_axis(boxes, index[..., None], 1), score > -jnp.inf)


def clip(boxes: jax.Array, image_hw: jax.Array, convention: BoxConvention) -> jax.Array:
    """Clips boxes [B, ..., 4] to images of heights and widths [B, 2]."""
    return jax.vmap(functools.partial(clip_boxes, convention=convention))(boxes, image_hw)


def is_at_least(boxes: jax.Array, side: float, convention: BoxConvention) -> jax.Array:
    """Whether both sides of boxes [..., 4] are at least ``side`` pixels long."""
    sides = boxes[..., 2:] - boxes[..., :2] + convention.pixel
    return jnp.all(sides >= side, axis=-1)


def smooth_l1(error: jax.Array, *, beta: float) -> jax.Array:
    """Returns |error| - beta / 2, and error^2 / (2 beta) where |error| is below beta."""
    return optax.huber_loss(error, delta=beta) / beta
