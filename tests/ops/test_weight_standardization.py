"""standardize equals the authors' arrays, a second implementation, autodiff and Flax."""

import functools
import itertools
import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from oracles import (
    STANDARDIZED,
    normal,
    relative_error,
    tree_relative_error,
    value_and_vjp,
)

from wsbcn_flax import WSConv, standardize
from wsbcn_flax.ops import PRESETS, StandardizationRule

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GOLDEN_FILES = {
    "official": "ws_conv_std_plus_eps_unbiased.npz",
    "bcn": "ws_conv_sqrt_var_plus_eps_unbiased.npz",
}
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def formula(preset, kernel, xp=np, out_axis=-1):
    """Applies the oracle to a kernel of any rank."""
    moved = xp.moveaxis(kernel, out_axis, -1)
    with jax.numpy_rank_promotion("allow"):
        hat = STANDARDIZED[preset](moved.reshape(-1, moved.shape[-1]), xp)
    return xp.moveaxis(hat.reshape(moved.shape), -1, out_axis)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("preset", GOLDEN_FILES)
def test_equals_the_authors_convolution(preset, case, dtype):
    with np.load(GOLDEN / GOLDEN_FILES[preset]) as arrays:
        get = lambda name: jnp.asarray(arrays[f"{case}_{name}"], dtype)  # noqa: E731
        kernel, x, dy = get("kernel_hwio"), get("x_nhwc"), get("dy_nhwc")
        stride, padding, dilation, groups = (int(value) for value in arrays[f"{case}_conf"])
        conv = WSConv(
            kernel.shape[-1],
            kernel.shape[:2],
            strides=stride,
            padding=padding,
            kernel_dilation=dilation,
            feature_group_count=groups,
            use_bias=False,
            preset=preset,
        )
        convolve = lambda kernel, x: conv.apply({"params": {"kernel": kernel}}, x)  # noqa: E731
        y, gradients = value_and_vjp(convolve, (kernel, x), dy)
        names = ("y_nhwc", "dkernel_hwio", "dx_nhwc")
        for actual, name in zip((y, *gradients), names, strict=True):
            assert actual.dtype == dtype
            assert relative_error(actual, arrays[f"{case}_{name}"]) < TOLERANCE[dtype], name


def test_the_golden_cases_are_grouped_strided_and_dilated():
    for name in GOLDEN_FILES.values():
        with np.load(GOLDEN / name) as arrays:
            strides, _, dilations, groups = np.stack([arrays[f"{i}_conf"] for i in range(4)]).T
            assert max(strides) > 1
            assert max(dilations) > 1
            assert max(groups) > 1


def test_every_preset_has_an_oracle():
    assert set(PRESETS) == set(STANDARDIZED)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("preset", "shape"),
    [*((preset, (3, 2, 4, 5)) for preset in PRESETS), ("bcn", (7, 3)), ("wn", (2, 3, 2, 2, 3))],
)
def test_equals_the_formula_with_its_derivatives(preset, shape):
    kernel = 0.5 + 0.3 * normal(1, *shape, dtype=jnp.float64)
    dy, direction = (normal(seed, *shape, dtype=jnp.float64) for seed in (2, 3))
    hat = standardize(kernel, preset=preset)
    assert relative_error(hat, formula(preset, np.asarray(kernel))) < 1e-10

    def derivatives(function):
        first = jax.grad(lambda k: jnp.sum(function(k) * dy))
        second = jax.grad(lambda k: jnp.sum(first(k) * direction))
        return jax.jit(lambda k: (first(k), second(k)))(kernel)

    ours = derivatives(lambda k: standardize(k, preset=preset))
    assert tree_relative_error(ours, derivatives(lambda k: formula(preset, k, jnp))) < 1e-9


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("preset", ["official", "nfnet"])
def test_derivatives_equal_finite_differences(preset):
    """This covers the kernel, the gain, and mixed second derivatives."""
    kernel = 0.5 + normal(1, 3, 2, 4, dtype=jnp.float64)
    gain = 1 + 0.1 * normal(2, 4, dtype=jnp.float64)
    function = lambda k, g: standardize(k, preset=preset, gain=g)  # noqa: E731
    check_grads(jax.jit(function), (kernel, gain), order=2, modes=["rev"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("preset", PRESETS)
def test_gain_multiplies_and_its_gradient_is_the_plain_output(preset):
    kernel, dy = (normal(seed, 3, 3, 4, 5, dtype=jnp.float64) for seed in (1, 2))
    gain = normal(3, 5, dtype=jnp.float64)
    plain = standardize(kernel, preset=preset)
    y, vjp = jax.vjp(lambda g: standardize(kernel, preset=preset, gain=g), gain)
    assert relative_error(y, plain * gain[None, None, None]) < 1e-12
    expected = jnp.sum(dy * plain, (0, 1, 2))
    if PRESETS[preset].constants:
        assert (vjp(dy)[0] == 0).all()
    else:
        assert relative_error(vjp(dy)[0], expected) < 1e-12


@pytest.mark.parametrize("out_axis", [-2, 0, 1])
@pytest.mark.parametrize("preset", ["bcn", "nfnet"])
def test_out_axis(preset, out_axis):
    kernel, gain = normal(1, 3, 3, 4, 3), normal(2, (3, 3, 4, 3)[out_axis])
    moved = standardize(jnp.moveaxis(kernel, out_axis, -1), preset=preset, gain=gain)
    actual = standardize(kernel, preset=preset, out_axis=out_axis, gain=gain)
    assert relative_error(actual, jnp.moveaxis(moved, -1, out_axis)) < 1e-6


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_is_finite_at_a_constant_kernel(preset):
    dy = normal(2, 3, 3, 4, 5)
    function = functools.partial(standardize, preset=preset)
    for center, spread in itertools.product([0.0, 0.3], [0.0, 1e-20, 1e-15, 1e-8]):
        kernel = center + spread * normal(1, 3, 3, 4, 5)
        chex.assert_tree_all_finite(value_and_vjp(function, (kernel,), dy))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_kernels_are_computed_in_float32(preset, dtype):
    kernel, dy = (0.02 * normal(seed, 3, 3, 4, 5, dtype=dtype) for seed in (1, 2))
    function = lambda k: standardize(k, preset=preset)  # noqa: E731
    hat, vjp = jax.vjp(function, kernel)
    wide, wide_vjp = jax.vjp(function, kernel.astype(jnp.float32))
    assert hat.dtype == dtype
    np.testing.assert_array_equal(hat, wide.astype(dtype))
    of_wide = wide_vjp(dy.astype(jnp.float32))[0]
    np.testing.assert_array_equal(vjp(dy)[0], of_wide.astype(dtype))
    # Only the output is in half precision; the gain is not rounded before.
    gain = jnp.float32([1.003, 2, 3, 4, 5])
    narrow, narrow_vjp = jax.vjp(
        lambda k: standardize(k, preset=preset, gain=gain, dtype=dtype), kernel.astype(jnp.float32)
    )
    np.testing.assert_array_equal(narrow, (wide * gain[None, None, None]).astype(dtype))
    assert narrow_vjp(dy)[0].dtype == jnp.float32
    assert standardize(kernel.astype(jnp.float32), preset=preset, dtype=dtype).dtype == dtype
    # At a constant kernel the true gradient is up to 1e6 times dy, beyond float16 for most dy.
    _, vjp = jax.vjp(function, jnp.full_like(kernel, 0.3))
    assert jnp.isfinite(vjp(1e-3 * dy)[0]).all()


@pytest.mark.usefixtures("x64")
def test_custom_rule():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 5))
    rule = StandardizationRule(denominator="sqrt_var_plus_eps", epsilon=0.25, center=False)
    expected = kernel / np.sqrt((kernel**2).mean((0, 1, 2)) + 0.25)
    assert relative_error(standardize(jnp.asarray(kernel), preset=rule), expected) < 1e-12


@pytest.mark.usefixtures("x64")
def test_weight_normalization_is_flax_weight_norm():
    x = normal(1, 2, 6, 6, 3, dtype=jnp.float64)
    kernel, gain = normal(2, 3, 3, 3, 4, dtype=jnp.float64), normal(3, 4, dtype=jnp.float64)
    bias = normal(4, 4, dtype=jnp.float64)
    conv = nn.Conv(4, (3, 3), param_dtype=jnp.float64)
    oracle = nn.WeightNorm(conv, variable_filter={"kernel"}, param_dtype=jnp.float64)

    def theirs(kernel, gain):
        layer = {"kernel": kernel, "bias": bias}
        params = {"layer_instance": layer, "layer_instance/kernel/scale": gain}
        return oracle.apply({"params": params}, x)

    def ours(kernel, gain):
        conv = WSConv(4, (3, 3), preset="wn", param_dtype=jnp.float64)
        return conv.apply({"params": {"kernel": kernel, "bias": bias, "gain": gain}}, x)

    dy = normal(5, 2, 6, 6, 4, dtype=jnp.float64)
    actual, expected = (value_and_vjp(f, (kernel, gain), dy) for f in (ours, theirs))
    assert tree_relative_error(actual, expected) < 1e-10
