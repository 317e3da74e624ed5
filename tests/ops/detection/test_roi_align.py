"""RoIAlign: torchvision's values and gradients, a plain loop, and both implementations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_oracles import golden, random_boxes
from detection_oracles import roi_align as looped_roi_align
from oracles import normal, relative_error, value_and_vjp

from wsbcn_flax.ops.detection import roi_align

IMPLEMENTATIONS = ["gather", "einsum"]
BOXES = random_boxes(0, 10, extent=64, side=40)
# Some boxes are partly or wholly outside the image, have no area, or corners out of order.
ODD_BOXES = np.array(
    [
        [-30, -20, 10, 90],
        [60, 60, 200, 90],
        [200, 200, 300, 300],
        [-90, 0, -60, 20],
        [8, 8, 8, 8],
        [20, 20, 9, 9],
    ],
    np.float32,
)
IMAGE = np.arange(10) % 2


@functools.cache
def pooled(implementation, output_size=3, samples=2, aligned=False):
    """Returns the operation as a function of features, boxes, image indices and flags."""
    return jax.jit(
        lambda features, boxes, image, valid=None: roi_align(
            features,
            boxes,
            image,
            output_size=output_size,
            spatial_scale=1 / 4,
            samples=samples,
            aligned=aligned,
            valid=valid,
            implementation=implementation,
        )
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("alignment", ["legacy", "aligned"])
def test_values_and_gradients_equal_torchvision(alignment, size, implementation):
    inputs, expected = golden("roi_"), golden(f"roi_{alignment}_{size}_")
    channels = expected["y_nhwc"].shape[-1]
    boxes, image = (jnp.asarray(inputs[name]) for name in ("boxes_xyxy", "image"))
    align = pooled(implementation, size, int(inputs["sampling_ratio"]), alignment == "aligned")
    features = jnp.asarray(inputs["x_nhwc"][..., :channels])
    y, (dx,) = value_and_vjp(
        lambda x: align(x, boxes, image), (features,), jnp.asarray(expected["dy_nhwc"])
    )
    np.testing.assert_allclose(y, expected["y_nhwc"], atol=1e-4)
    np.testing.assert_allclose(dx, expected["dx_nhwc"], atol=1e-4)
    other = golden(f"roi_{'legacy' if alignment == 'aligned' else 'aligned'}_{size}_")
    assert abs(y - other["y_nhwc"]).max() > 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_equals_a_loop_over_samples(samples, aligned, implementation):
    features = normal(0, 2, 16, 18, 3)
    boxes = np.concatenate([BOXES, ODD_BOXES])
    image = np.arange(len(boxes)) % 2
    actual = pooled(implementation, 3, samples, aligned)(features, boxes, image)
    for value, box, i in zip(actual, boxes, image, strict=True):
        expected = looped_roi_align(
            features[i], box, 3, spatial_scale=1 / 4, samples=samples, aligned=aligned
        )
        np.testing.assert_allclose(value, expected, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_implementations_agree_in_float64():
    """Values and gradients agree for more boxes than a chunk of products holds."""
    features = normal(0, 2, 16, 18, 3, dtype=jnp.float64)
    boxes = random_boxes(1, 150, extent=64, side=40).astype(np.float64)
    image = np.arange(150) % 2
    dy = normal(1, 150, 3, 3, 3, dtype=jnp.float64)
    one, other = (
        value_and_vjp(lambda x: pooled(name)(x, boxes, image), (features,), dy)  # noqa: B023
        for name in IMPLEMENTATIONS
    )
    chex.assert_trees_all_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_height_and_width_may_differ(implementation):
    features = normal(0, 2, 16, 18, 3)
    wide = pooled(implementation, (2, 6))(features, BOXES, IMAGE)
    assert wide.shape == (10, 2, 6, 3)
    turned = jnp.swapaxes(features, 1, 2), BOXES[:, [1, 0, 3, 2]], IMAGE
    np.testing.assert_allclose(
        jnp.swapaxes(pooled(implementation, (6, 2))(*turned), 1, 2), wide, atol=1e-5
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_invalid_boxes_give_zeros_and_take_no_gradient(implementation):
    features, valid = normal(0, 2, 16, 18, 3), np.arange(10) % 3 > 0
    padded = np.where(valid[:, None], BOXES, np.nan)  # Padding may hold anything.
    dy = normal(1, 10, 3, 3, 3)
    align = pooled(implementation)
    y, (dx,) = value_and_vjp(lambda x: align(x, padded, IMAGE, valid), (features,), dy)
    expected, (expected_dx,) = value_and_vjp(
        lambda x: align(x, BOXES[valid], IMAGE[valid]), (features,), dy[valid]
    )
    assert (y[~valid] == 0).all()
    np.testing.assert_allclose(y[valid], expected, atol=1e-6)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_features(implementation):
    """Values round once; gradients add up in float32 where hundreds of boxes overlap."""
    features = normal(0, 1, 6, 6, 2, dtype=jnp.bfloat16)
    boxes = np.tile(np.array([[2, 2, 18, 18]], np.float32), (400, 1))
    image, dy = np.zeros(400, np.int32), jnp.ones((400, 3, 3, 2))
    align = pooled(implementation)
    y, (dx,) = value_and_vjp(lambda x: align(x, boxes, image), (features,), dy.astype(jnp.bfloat16))
    wide, (wide_dx,) = value_and_vjp(
        lambda x: align(x, boxes, image), (features.astype(jnp.float32),), dy
    )
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert relative_error(y, wide) < 2**-8
    assert relative_error(dx, wide_dx) < 2**-8


def test_coordinates_are_never_rounded_to_half_precision():
    """A box at 1001 of 1024 pixels: bfloat16 has no number between 1000 and 1004."""
    features = jnp.arange(256.0)[None, None, :, None] * jnp.ones((1, 4, 1, 1))
    boxes = np.array([[1001, 0, 1005, 4]], np.float32)
    for name in IMPLEMENTATIONS:
        y = roi_align(
            features, boxes, np.array([0]), output_size=1, spatial_scale=1 / 4, implementation=name
        )
        np.testing.assert_allclose(y[0, 0, 0, 0], 1003 / 4, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_maps_over_images(implementation):
    features = normal(0, 2, 16, 18, 3)
    align = lambda x, b: pooled(implementation)(x[None], b, np.zeros(5, int))  # noqa: E731
    boxes = BOXES.reshape(5, 2, 4).swapaxes(0, 1)
    mapped = jax.vmap(align)(features, boxes).swapaxes(0, 1).reshape(10, 3, 3, 3)
    expected = pooled(implementation)(features, BOXES, IMAGE)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_boxes_take_no_gradient(implementation):
    features = normal(0, 2, 16, 18, 3)
    gradient = jax.grad(lambda boxes: pooled(implementation)(features, boxes, IMAGE).sum())
    assert (gradient(jnp.asarray(BOXES)) == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_boxes(implementation):
    empty = jnp.zeros((0, 4)), jnp.zeros(0, int)
    assert pooled(implementation)(normal(0, 2, 16, 18, 3), *empty).shape == (0, 3, 3, 3)


def test_auto_multiplies_on_tpu_and_gathers_elsewhere():
    features = normal(0, 2, 16, 18, 3)
    align = pooled("auto")
    traced = align.trace(features, BOXES, IMAGE)
    for platform in ("cpu", "cuda", "tpu"):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("dot_general" in program) == (platform == "tpu")
    dy = normal(1, 10, 3, 3, 3)
    actual, expected = (
        value_and_vjp(lambda x: f(x, BOXES, IMAGE), (features,), dy)  # noqa: B023
        for f in (align, pooled("gather"))
    )
    chex.assert_trees_all_close(actual, expected, atol=1e-6)


def test_bad_arguments_are_errors():
    x, boxes, image = jnp.zeros((1, 4, 4, 1)), jnp.zeros((2, 4)), jnp.zeros(2, int)
    align = functools.partial(roi_align, output_size=2, spatial_scale=1.0)
    with pytest.raises(ValueError, match=r"features must have shape \[B, H, W, C\]"):
        align(x[0], boxes, image)
    with pytest.raises(ValueError, match=r"one image for each box, received \(1,\)"):
        align(x, boxes, image[:1])
    with pytest.raises(ValueError, match="received 'fast'"):
        align(x, boxes, image, implementation="fast")
    with pytest.raises(ValueError, match="at least 1, received 2 and 0"):
        align(x, boxes, image, samples=0)
