"""Two-stage object detection: Faster R-CNN and Mask R-CNN."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.models._padding import repeat_edges
from wsbcn_flax.models.detection import MaskRCNN
from wsbcn_flax.ops.detection import (
    TORCHVISION,
    BoxConvention,
    bitmap_targets,
    mask_targets,
    pyramid_roi_align,
)
from wsbcn_flax.tasks._proposals import (
    STRIDES,
    Boxes,
    make_anchors,
    proposal_losses,
    select_proposals,
)
from wsbcn_flax.tasks._regions import (
    Regions,
    box_losses,
    mask_loss,
    of_label,
    sample_regions,
    select_detections,
)
from wsbcn_flax.tasks._task import Batch, Metrics, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection(Task):
    """The detection task: Faster R-CNN or Mask R-CNN, with every shape fixed.

    A batch has B images of any size, padded below and on the right to H x W. It holds:

    - ``image`` [B, H, W, C], normalized, with H and W multiples of 32;
    - ``image_hw`` [B, 2], heights and widths without padding, in pixels;
    - ``id`` [B], integers that tell images apart;
    - ``boxes`` [B, G, 4], corners x1, y1, x2, y2 in pixels, where x2 - x1 is the width;
    - ``labels`` [B, G], classes from 1 to K;
    - ``valid`` [B, G], whether the slot holds an object; other slots may hold anything;
    - for Mask R-CNN either ``masks`` [B, G, M, M], 0 or 1 on a grid over each object's own box, or
      ``bitmaps`` [B, G, H, W], 0 or 1 on the whole image.

    Targets of the mask head made from ``masks`` are 0 or 1, like the authors'. Those made from
    ``bitmaps`` are averages over each bin, like torchvision's.

    The loss is the sum of ``objectness_loss``, ``proposal_loss``, ``class_loss``, ``box_loss`` and
    ``mask_loss``. In every image, each is divided by the number of sampled anchors, regions or
    objects; the results are averaged over images. An image draws its samples from a key that
    depends on its ``id`` and on the step, which ``extra`` counts. So the step is the same however
    the batch is split. ``rng``, which differs between devices and micro-batches, is not used.

    The normalizations in the heads compute statistics of all ``regions`` slots, used or not.

    Attributes:
        model: Networks of the detector.
        convention: Convention of boxes and anchors. With ``proposals_per="device"``, as in
            ``AUTHORS``, proposals are the best of all images in a device's micro-batch, and losses
            are normalized over these images together. This is as published, but the step then
            depends on how the batch is split. ``dataclasses.replace(AUTHORS,
            proposals_per="image")`` keeps the rest of the convention.
        leave_out_padding: Whether the padding is left out of statistics of the normalizations and
            has no anchors. The detections are then those of the image without padding.
        anchor_sizes: Side of the square anchors of the five levels, in pixels.
        anchors: Number of anchors sampled in an image; at most half of them are positive.
        regions: Number of regions sampled in an image; at most a quarter of them are positive.
        proposals: Numbers of proposals for an image, in training and in evaluation. Each is also
            the number of anchors decoded in a level.
        detections: Number of detections in an image.
        score_threshold: Probability that a detection must exceed.
        proposal_iou, detection_iou: Largest IoU of two proposals from one level, and of two
            detections of one class.
        seed: Seed of the sampling of anchors and regions.

    Raises:
        ValueError: When traced, for a batch without the arrays named here, or of other shapes.

    References:
        He et al., Mask R-CNN, https://arxiv.org/abs/1703.06870; the published numbers are those of
        https://github.com/facebookresearch/maskrcnn-benchmark

    Example:
        >>> import functools, flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import ResNet18
        >>> from wsbcn_flax.models.detection import MaskRCNN
        >>> from wsbcn_flax.tasks import Detection
        >>> backbone = ResNet18(num_classes=None, norm=nn.GroupNorm)
        >>> task = Detection(model=MaskRCNN(backbone, num_classes=80, norm=nn.GroupNorm))
        >>> batch = {"image": jnp.ones((2, 64, 64, 3)), "image_hw": jnp.array([[64, 50], [40, 64]])}
        >>> variables = jax.eval_shape(task.init, jax.random.key(0), batch)
        >>> found = jax.eval_shape(task.evaluate, variables["params"], {}, batch)
        >>> found["boxes"].shape, found["masks"].shape
        ((2, 100, 4), (2, 100, 28, 28))
    """

    model: MaskRCNN
    convention: BoxConvention = TORCHVISION
    leave_out_padding: bool = False
    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512)
    anchors: int = 256
    regions: int = 512
    proposals: tuple[int, int] = (2000, 1000)
    detections: int = 100
    score_threshold: float = 0.05
    proposal_iou: float = 0.7
    detection_iou: float = 0.5
    seed: int = 0

    def init(self, key: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """Returns the model's variables, which do not depend on the size of the images."""
        images = jnp.zeros((1, 64, 64, batch["image"].shape[-1]), batch["image"].dtype)
        return self.model.init(key, images, train=False)

    def loss(
        self, params: Any, batch_stats: Any, batch: Batch, *, rng: jax.Array, extra: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Returns the sum of the losses, new batch_stats, and every loss.

        Args:
            params: Parameters of the model.
            batch_stats: Running statistics.
            batch: Arrays as named above.
            rng: Not used.
            extra: Number of the step [], from ``after_update``.
        """
        masks = "bitmaps" if "bitmaps" in batch else "masks"
        self._check(batch, "id", "boxes", "labels", "valid", *[masks] * self.model.with_mask)
        key = jax.random.fold_in(jax.random.key(self.seed), extra)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["id"])
        train = nn.apply(self._train, self.model, mutable=["batch_stats"])
        losses, updates = train({"params": params, "batch_stats": batch_stats}, batch, keys)
        loss = sum(losses.values(), jnp.zeros(()))
        return loss, (updates.get("batch_stats", {}), losses)

    def evaluate(self, params: Any, batch_stats: Any, batch: Batch) -> dict[str, jax.Array]:
        """Returns the detections of every image, in order of decreasing score.

        They are ``boxes`` [B, D, 4] in pixels of the image, ``scores`` [B, D], ``labels`` [B, D]
        from 1 and ``valid`` [B, D]. Mask R-CNN adds ``masks`` [B, D, 28, 28], probabilities on a
        grid over each box. ``image_hw`` and, if the batch has them, ``id`` and ``mask`` are copied.
        """
        self._check(batch)
        detect = nn.apply(self._detect, self.model)
        found = detect({"params": params, "batch_stats": batch_stats}, batch)
        return found | {k: batch[k] for k in ("image_hw", "id", "mask") if k in batch}

    def after_update(self, state: Any) -> jax.Array:
        """Returns the number of the next step, from which ``loss`` derives its sampling keys."""
        return jnp.asarray(state.step)

    def _train(self, model: MaskRCNN, batch: Batch, keys: jax.Array) -> Metrics:
        """Computes the losses; ``model`` is bound to its variables."""
        convention = self.convention
        per_device = convention.proposals_per == "device"
        of_anchors, of_regions = jax.vmap(jax.random.split, out_axes=1)(keys)
        image_hw, labels = batch["image_hw"], batch["labels"]
        # Empty slots may hold NaN, whose gradient is NaN however small a share it has in the loss.
        valid = batch["valid"].astype(bool)
        boxes = jnp.where(valid[..., None], batch["boxes"], 0)
        truth = Boxes(boxes - self._last_pixel(boxes), valid)

        levels, anchors, outputs = self._first_stage(model, batch, train=True)
        objectness, proposal = proposal_losses(
            outputs,
            anchors,
            truth,
            image_hw,
            of_anchors,
            samples=self.anchors,
            convention=convention,
        )
        proposals = self._propose(lax.stop_gradient(outputs), anchors, image_hw, train=True)
        regions = sample_regions(
            proposals, truth, labels, of_regions, samples=self.regions, convention=convention
        )
        features = self._align(levels, regions.boxes, model.box_size)
        logits, deltas = _on_regions(model.classify, features, train=True)
        class_error, box_error = box_losses(logits, deltas, regions, convention=convention)
        sums = {
            "objectness_loss": objectness,
            "proposal_loss": proposal,
            "class_loss": class_error,
            "box_loss": box_error,
        }
        if model.with_mask:
            # Positive regions come first.
            first = jax.tree.map(lambda x: x[:, : self.regions // 4], regions)
            features = self._align(levels, first.boxes, model.mask_size)
            logits = _on_regions(model.segment, features, train=True)
            targets = self._mask_targets(batch, truth.boxes, first)
            sums["mask_loss"] = mask_loss(logits, targets, first.labels, first.positive)
        return {name: each.mean(per_device=per_device) for name, each in sums.items()}

    def _detect(self, model: MaskRCNN, batch: Batch) -> dict[str, jax.Array]:
        """Computes the detections; ``model`` is bound to its variables."""
        image_hw = batch["image_hw"]
        levels, anchors, outputs = self._first_stage(model, batch, train=False)
        proposals = self._propose(outputs, anchors, image_hw, train=False)
        features = self._align(levels, proposals.boxes, model.box_size)
        logits, deltas = _on_regions(model.classify, features, train=False)
        found = select_detections(
            logits,
            deltas,
            proposals,
            image_hw,
            count=self.detections,
            score_threshold=self.score_threshold,
            iou_threshold=self.detection_iou,
            convention=self.convention,
        )
        outputs = found._asdict() | {"boxes": found.boxes + self._last_pixel(found.boxes)}
        if model.with_mask:
            features = self._align(levels, found.boxes, model.mask_size)
            logits = _on_regions(model.segment, features, train=False)
            outputs["masks"] = jax.nn.sigmoid(of_label(logits, found.labels))
        return outputs

    def _first_stage(self, model: MaskRCNN, batch: Batch, *, train: bool) -> Any:
        """Computes the levels for RoIAlign, the anchors, and the outputs of the first stage."""
        image_hw = batch["image_hw"]
        levels = model.pyramid(
            batch["image"], train=train, image_hw=image_hw if self.leave_out_padding else None
        )
        anchors = make_anchors(
            levels,
            image_hw,
            sizes=self.anchor_sizes,
            convention=self.convention,
            leave_out_padding=self.leave_out_padding,
        )
        outputs = model.propose(levels)
        if self.leave_out_padding:
            levels = [repeat_edges(x, image_hw, s) for x, s in zip(levels, STRIDES, strict=True)]
        return levels, anchors, outputs

    def _propose(self, outputs: Any, anchors: Any, image_hw: jax.Array, *, train: bool) -> Boxes:
        count = self.proposals[0 if train else 1]
        return select_proposals(
            outputs,
            anchors,
            image_hw,
            per_level=count,
            count=count,
            iou_threshold=self.proposal_iou,
            convention=self.convention,
            per_device=train and self.convention.proposals_per == "device",
        )

    def _align(self, levels: Sequence[jax.Array], boxes: jax.Array, size: int) -> jax.Array:
        """Computes features [B, N, size, size, C] of boxes [B, N, 4]."""
        return pyramid_roi_align(
            levels[: len(STRIDES) - 1],  # The coarsest level is only for anchors.
            boxes,
            strides=STRIDES[:-1],
            output_size=size,
            convention=self.convention,
        )

    def _mask_targets(self, batch: Batch, boxes: jax.Array, regions: Regions) -> jax.Array:
        """Makes the masks [B, P, size, size] of each region's object, on a grid over the region."""
        size = 2 * self.model.mask_size
        if "bitmaps" in batch:
            targets = functools.partial(bitmap_targets, size=size)
            return jax.vmap(targets)(batch["bitmaps"], regions.boxes, regions.truth)
        targets = functools.partial(mask_targets, size=size, convention=self.convention)
        return jax.vmap(targets)(batch["masks"], boxes, regions.boxes, regions.truth)

    def _last_pixel(self, boxes: jax.Array) -> jax.Array:
        """Returns the offset of x2 and y2 where boxes end with the last pixel, else zeros."""
        return self.convention.pixel * jnp.broadcast_to(jnp.array([0.0, 0, 1, 1]), boxes.shape)

    def _check(self, batch: Batch, *further: str) -> None:
        names = ("image", "image_hw", *further)
        if not set(names) <= set(batch):
            raise ValueError(
                f"Detection needs batches of {', '.join(names)}, received one of "
                f"{', '.join(batch) or 'nothing'}."
            )
        height, width = batch["image"].shape[1:3]
        if height % 32 or width % 32:
            raise ValueError(
                "Images must be padded to multiples of 32, received "
                f"{height}x{width} (height x width)."
            )


def _on_regions(head: Callable[..., Any], features: jax.Array, *, train: bool) -> Any:
    """Applies a head to features [B, N, S, S, C]; returns outputs [B, N, ...]."""
    outputs = head(features.reshape(-1, *features.shape[2:]), train=train)
    return jax.tree.map(lambda x: x.reshape(*features.shape[:2], *x.shape[1:]), outputs)
