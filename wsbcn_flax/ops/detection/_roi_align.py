"""RoIAlign over one feature map."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops.detection._checks import as_boxes, as_valid
from wsbcn_flax.ops.detection._roi_einsum import einsum_roi_align
from wsbcn_flax.ops.detection._roi_gather import gather_roi_align
from wsbcn_flax.ops.detection._roi_samples import Grid, Rois

Implementation = Literal["auto", "gather", "einsum"]


def roi_align(
    features: jax.Array,
    boxes: jax.Array,
    image_index: jax.Array,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    samples: int = 2,
    aligned: bool = False,
    valid: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Averages bilinear samples of the features in each bin of a grid over each box.

    A bin has samples x samples points at regular distances. Points up to one pixel outside the map
    are clamped to it, and those further away count as zero. Gradients flow to the features only,
    in reverse mode.

    Both implementations give the same numbers. "gather" reads the neighbours of every point.
    "einsum" multiplies by weights of rows and columns. It needs no gather or scatter, but processes
    a whole map for each box. "auto" takes "einsum" on TPU and "gather" elsewhere.

    Args:
        features: Feature maps [B, H, W, C], floating-point.
        boxes: Boxes [R, 4], xyxy in pixels of the image.
        image_index: Image of each box, from 0 to B - 1, [R].
        output_size: Number of bins along y and x, or one number for both.
        spatial_scale: Pixels of the map for one pixel of the image, for example 1 / 4.
        samples: Number of samples along each side of a bin.
        aligned: Whether pixel centers are at 0.5, as in torchvision's ``aligned=True``. Otherwise
            they are at 0, and boxes are at least one pixel of the map wide and high.
        valid: Flags [R] of valid boxes, or None for all. Other boxes give zeros.
        implementation: Name of the implementation: "auto", "gather" or "einsum".

    Returns:
        Pooled features [R, bins, bins, C], in the dtype of ``features``; sums are float32 or wider.

    Raises:
        ValueError: If a shape or an option is wrong.

    References:
        He et al., Mask R-CNN, https://arxiv.org/abs/1703.06870

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import roi_align
        >>> features = jnp.arange(16.0).reshape(1, 1, 16, 1) * jnp.ones((1, 16, 1, 1))
        >>> boxes = jnp.array([[8.0, 8.0, 40.0, 40.0]])
        >>> pooled = roi_align(features, boxes, jnp.array([0]), output_size=2, spatial_scale=1 / 4)
        >>> pooled[0, :, :, 0].tolist()
        [[4.0, 8.0], [4.0, 8.0]]
    """
    boxes = lax.stop_gradient(as_boxes(boxes, "boxes", rank=2))
    if features.ndim != 4:
        raise ValueError(f"features must have shape [B, H, W, C], received {features.shape}.")
    if image_index.shape != boxes.shape[:1]:
        raise ValueError(
            f"image_index must hold one image for each box, received {image_index.shape} for boxes "
            f"{boxes.shape}."
        )
    valid = as_valid(valid, boxes.shape[:1], "valid")
    # Invalid boxes may hold NaN, and 0 times NaN is not 0.
    boxes = jnp.where(valid[:, None], boxes, 0)
    image_index = jnp.clip(image_index, 0, len(features) - 1)
    rois = Rois(boxes, image_index, jnp.zeros_like(image_index), valid)
    options = {
        "scales": (spatial_scale,),
        "grid": Grid.checked(output_size, samples, aligned),
    }
    return dispatch(
        implementation,
        functools.partial(gather_roi_align, **options),
        functools.partial(einsum_roi_align, **options),
        (features,),
        rois,
    )


def dispatch(implementation: str, gather: Callable, einsum: Callable, pyramid, rois) -> jax.Array:
    """Applies the chosen one of two functions to (pyramid, rois).

    Raises:
        ValueError: For an unknown choice.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)}, received "
            f"{implementation!r}."
        )
    if implementation == "auto":
        return lax.platform_dependent(pyramid, rois, tpu=einsum, default=gather)
    return (einsum if implementation == "einsum" else gather)(pyramid, rois)
