"""channel_norm equals nn.GroupNorm, also on the valid region of a masked input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal, relative_error, tree_relative_error, value_and_vjp

from wsbcn_flax.ops import channel_norm


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((4, 12), 3), ((4, 9, 12), 12), ((4, 5, 7, 12), 3), ((2, 3, 4, 5, 12), 1)],
)
def test_equals_flax_group_norm_with_its_gradients(shape, num_groups):
    x, dy = (1 + normal(seed, *shape, dtype=jnp.float64) for seed in (1, 2))
    scale, bias = (normal(seed, 12, dtype=jnp.float64) for seed in (3, 4))

    def flax_group_norm(x, scale, bias):
        norm = nn.GroupNorm(num_groups, epsilon=1e-5)
        return norm.apply({"params": {"scale": scale, "bias": bias}}, x)

    def ours(x, scale, bias):
        return channel_norm(x, scale, bias, num_groups=num_groups)

    actual, expected = (value_and_vjp(f, (x, scale, bias), dy) for f in (ours, flax_group_norm))
    assert tree_relative_error(actual, expected) < 1e-11


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_groups", [1, 3])
def test_the_form_for_tpu_is_the_same_function(num_groups, monkeypatch, request):
    """On TPU, groups are summed by a product with a matrix."""
    x, dy = (1 + normal(seed, 2, 5, 7, 12, dtype=jnp.float64) for seed in (1, 2))
    scale, bias = (normal(seed, 12, dtype=jnp.float64) for seed in (3, 4))
    function = functools.partial(channel_norm, num_groups=num_groups)
    expected = value_and_vjp(function, (x, scale, bias), dy)

    calls = []

    def on_tpu(*operands, tpu, default):
        calls.append(tpu)
        return tpu(*operands)

    request.getfixturevalue("traced_anew")
    monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
    actual = value_and_vjp(lambda *primals: function(*primals), (x, scale, bias), dy)
    assert calls
    assert tree_relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize(("platform", "products"), [("tpu", True), ("cpu", False)])
def test_groups_are_products_on_tpu_alone(platform, products):
    # Under vmap no TPU kernel is used.
    norm = jax.vmap(functools.partial(channel_norm, num_groups=3))
    traced = jax.jit(norm).trace(jnp.ones((1, 2, 4, 4, 12)))
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("dot_general" in lowered) == products


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("ratio", [0, 1e3])
def test_half_precision_is_rounded_only_at_the_end(dtype, ratio):
    x = ratio + normal(1, 2, 8, 8, 6, dtype=dtype)
    y = channel_norm(x, num_groups=3)
    wide = np.asarray(x).astype(np.float64).reshape(2, 64, 3, 2)
    centred = wide - wide.mean((1, 3), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)
    assert y.dtype == dtype
    assert relative_error(y, expected.reshape(x.shape)) < max(2e-5, float(jnp.finfo(dtype).eps))


@pytest.mark.usefixtures("x64")
def test_small_deviations_from_a_far_mean():
    """With a shift for each channel, the means of channels would be rounded at full magnitude."""
    x = 100 + 0.01 * normal(1, 2, 16, 16, 8)
    y = channel_norm(x, num_groups=4, epsilon=1e-8)
    expected = channel_norm(x.astype(jnp.float64), num_groups=4, epsilon=1e-8)
    assert relative_error(y, expected) < 1e-6


def test_one_value_per_group_is_that_value_for_each_of_its_channels():
    x, dy = normal(1, 2, 5, 5, 12), normal(2, 2, 5, 5, 12)
    scale, bias = normal(3, 4), normal(4, 4)
    function = functools.partial(channel_norm, num_groups=4)
    repeated = lambda x, s, b: function(x, jnp.repeat(s, 3), jnp.repeat(b, 3))  # noqa: E731
    actual, expected = (value_and_vjp(f, (x, scale, bias), dy) for f in (function, repeated))
    assert tree_relative_error(actual, expected) < 2e-6


@pytest.mark.usefixtures("x64")
def test_masked_equals_the_valid_region_with_its_gradients():
    x, dy = (normal(seed, 2, 6, 8, 6, dtype=jnp.float64) for seed in (1, 2))
    region = (slice(None), slice(1, 5), slice(2, 8))
    mask = jnp.zeros((2, 6, 8, 1)).at[region].set(1)
    masked = lambda x: channel_norm(x, num_groups=3, mask=mask)[region]  # noqa: E731
    cropped = lambda x: channel_norm(x[region], num_groups=3)  # noqa: E731
    actual, expected = (value_and_vjp(f, (x,), dy[region]) for f in (masked, cropped))
    assert tree_relative_error(actual, expected) < 1e-11


def test_does_not_depend_on_the_rest_of_the_batch():
    x = normal(1, 4, 5, 5, 6)
    other = x.at[1:].set(1e3)
    np.testing.assert_array_equal(
        channel_norm(x, num_groups=2)[0], channel_norm(other, num_groups=2)[0]
    )
