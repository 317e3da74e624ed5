"""channel_moments equals float64 numpy, without cancellation and with masks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal, relative_error, tree_relative_error

from wsbcn_flax.ops import channel_moments

compiled_moments = jax.jit(channel_moments)


def mean_and_var(x, mask=None):
    moments = channel_moments(x, mask=mask)
    return moments.shift + moments.mean, moments.var


@pytest.mark.parametrize("shape", [(4, 3), (4, 9, 3), (4, 5, 7, 3), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_equals_numpy(shape, dtype):
    x = 2 + normal(1, *shape, dtype=dtype)
    mean, var = mean_and_var(x)
    positions = tuple(range(1, len(shape) - 1))
    wide = np.asarray(x).astype(np.float64)
    assert mean.dtype == var.dtype == jnp.float32
    assert relative_error(mean, wide.mean(positions)) < 1e-6
    np.testing.assert_allclose(var, wide.var(positions), rtol=1e-5)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e5])
def test_variance_does_not_cancel(ratio):
    x = ratio + normal(1, 2, 16, 16, 8)
    expected = np.asarray(x, np.float64).var((1, 2))
    assert relative_error(compiled_moments(x).var, expected) < 1e-5


def test_variance_of_a_constant_is_exactly_zero():
    constant = jnp.full((2, 5, 5, 3), 1e4 + 0.1)
    assert (channel_moments(constant).var == 0).all()


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_masked_variance_does_not_cancel_wherever_the_padding_is(ratio):
    x = ratio + normal(1, 2, 16, 16, 8)
    mask = jnp.zeros((2, 16, 16, 1)).at[0, :9].set(1).at[1, 7:, 3:].set(1)
    wide = np.asarray(x, np.float64)
    expected = np.stack([wide[0, :9].var((0, 1)), wide[1, 7:, 3:].var((0, 1))])
    assert relative_error(compiled_moments(x, mask=mask).var, expected) < 1e-5


@pytest.mark.usefixtures("x64")
def test_gradients_are_those_of_the_mean_and_variance():
    x = 3 + normal(1, 2, 4, 5, 6, dtype=jnp.float64)
    weights = tuple(normal(seed, 2, 6, dtype=jnp.float64) for seed in (2, 3))

    def gradient(moments):
        return jax.grad(lambda x: sum(jnp.vdot(w, m) for w, m in zip(weights, moments(x))))(x)  # noqa: B905

    expected = gradient(lambda x: (jnp.mean(x, (1, 2)), jnp.var(x, (1, 2))))
    assert relative_error(gradient(mean_and_var), expected) < 1e-12


@pytest.mark.parametrize("mask_dtype", [bool, jnp.float32])
@pytest.mark.parametrize("first_is_valid", [True, False])
def test_masked_equals_the_valid_region(first_is_valid, mask_dtype):
    x = 1 + normal(1, 3, 6, 8, 5)
    corner = 0 if first_is_valid else 2
    region = (slice(None), slice(corner, corner + 3), slice(corner, corner + 5))
    mask = jnp.zeros((3, 6, 8, 1)).at[region].set(1).astype(mask_dtype)
    moments = channel_moments(x, mask=mask)
    actual = (moments.shift + moments.mean, moments.var)
    chex.assert_trees_all_close(actual, mean_and_var(x[region]), rtol=1e-5, atol=1e-6)
    assert (moments.weight == 15).all()


def test_padding_does_not_leak_whatever_it_holds():
    mask = jnp.arange(6).reshape(1, 6, 1) < jnp.array([6, 4, 0]).reshape(3, 1, 1)
    x = normal(1, 3, 6, 2)

    def run(x):
        outputs, vjp = jax.vjp(lambda x: mean_and_var(x, mask), x)
        return outputs, vjp(jax.tree.map(jnp.ones_like, outputs))[0]

    clean = run(jnp.where(mask, x, 0))
    chex.assert_tree_all_finite(clean)
    assert (jnp.where(mask, 0, clean[1]) == 0).all()
    for junk in (jnp.nan, jnp.inf, 1e30):
        chex.assert_trees_all_equal(run(jnp.where(mask, x, junk)), clean)


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (1, 6, 1, 1), (1, 1, 7, 1), (3, 6, 1, 1)])
def test_masks_broadcast(shape):
    x = normal(1, 3, 6, 7, 2)
    mask = jnp.asarray(np.random.default_rng(2).random(shape) < 0.6).at[0].set(True)
    full = jnp.broadcast_to(mask, (3, 6, 7, 1))
    error = tree_relative_error(compiled_moments(x, mask=mask), compiled_moments(x, mask=full))
    assert error == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 60.0, 1e3, 1e6])
def test_bfloat16_loses_nothing_to_cancellation(ratio, masked):
    """The variance is right even if only one of 3,136 positions differs, by 2^-7 of the mean."""
    x = (ratio + normal(0, 2, 56, 56, 8)).astype(jnp.bfloat16)
    one_bit = jnp.full((2, 56, 56), max(ratio, 1.0), jnp.bfloat16)
    x = x.at[..., 0].set(one_bit).at[..., 1].set(one_bit.at[:, 3, 3].multiply(1 + 2**-7))
    mask = (jnp.arange(56) < 40).reshape(1, 56, 1, 1) if masked else None
    moments = compiled_moments(x, mask=mask)
    exact = np.asarray(x, np.float64)[:, : 40 if masked else 56]
    var = exact.var((1, 2))
    assert (moments.var[:, 0] == 0).all()
    np.testing.assert_allclose(moments.var, var, rtol=1e-3)
    np.testing.assert_allclose(moments.var[:, 2:], var[:, 2:], rtol=1e-5)
    np.testing.assert_allclose(
        moments.shift + moments.mean, exact.mean((1, 2)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("ratio", [0.0, 10.0, 100.0])
def test_a_distant_shift_costs_less_than_rounding_to_bfloat16(ratio):
    """Cancellation in float32 stays below the variance that rounding adds to the data."""
    x = (ratio + normal(0, 2, 32, 32, 8)).astype(jnp.bfloat16)
    moments = compiled_moments(x, shift=jnp.zeros(8))
    exact = np.asarray(x, np.float64)
    assert moments.shift.shape == (1, 8)
    np.testing.assert_allclose(moments.mean, exact.mean((1, 2)), rtol=1e-5, atol=1e-6)
    rounding = (2.0**-9 * max(ratio, 1)) ** 2 / 3
    np.testing.assert_allclose(moments.var, exact.var((1, 2)), rtol=1e-6, atol=rounding)


OUTLIERS = {"first": (0, 0), "a quarter": (8, 8), "the middle": (16, 16), "last": (31, 31)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("position", OUTLIERS)
def test_no_single_outlier_costs_accuracy(position, masked):
    """A shift by the outlier itself would cost 4e-3 of the variance at 224x224."""
    mask = jnp.ones((2, 32, 32, 1)) if masked else None
    for size in (1e2, 1e4, 1e9):
        x = np.asarray(normal(0, 2, 32, 32, 3)).copy()
        x[0, *OUTLIERS[position]] = size
        expected = x.astype(np.float64).var((1, 2))
        actual = compiled_moments(jnp.asarray(x), mask=mask).var
        np.testing.assert_allclose(actual, expected, rtol=2e-6, err_msg=str(size))


@pytest.mark.parametrize("valid", [1, 2, 3, 7])
def test_few_valid_positions_suffice(valid):
    x = 1e4 + normal(0, 1, 8, 3)
    mask = (jnp.arange(8) >= 8 - valid).reshape(1, 8, 1)
    expected = np.asarray(x[:, 8 - valid :], np.float64).var(1)
    np.testing.assert_allclose(compiled_moments(x, mask=mask).var, expected, rtol=1e-5)


def test_a_shift_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shift"):
        channel_moments(jnp.ones((2, 4, 3)), shift=jnp.zeros(4))
