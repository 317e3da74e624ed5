"""From the forward pass, the backward pass keeps x itself and little else."""

import functools

import jax
import jax.numpy as jnp
import pytest
from oracles import normal

from wsbcn_flax.ops import RunningStats, batch_channel_norm, channel_norm, standardize


def sizes_kept(function, *primals):
    """Returns the number of elements of each array that the pull-back keeps, largest first."""
    pull_back = jax.vjp(function, *primals)[1]
    arrays = {id(leaf): leaf.size for leaf in jax.tree.leaves(pull_back)}
    return sorted(arrays.values(), reverse=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("order", ["update_first", "normalize_first"])
def test_bcn_keeps_x_and_arrays_of_channels(order, dtype):
    x = normal(1, 2, 16, 16, 12, dtype=dtype)
    norm = functools.partial(batch_channel_norm, num_groups=4, order=order)
    scale, bias, running = jnp.ones(12), jnp.zeros(12), RunningStats.fresh(12)

    def function(x, scale, bias):
        return norm(x, running, batch_scale=scale, batch_bias=bias)[0]

    largest, *others = sizes_kept(function, x, scale, bias)
    assert largest == x.size
    assert max(others) <= 2 * 12


def test_channel_norm_keeps_x_and_arrays_of_channels():
    x = normal(1, 2, 16, 16, 12)
    largest, *others = sizes_kept(functools.partial(channel_norm, num_groups=4), x)
    assert largest == x.size
    assert max(others) <= 2 * 12


def test_weight_standardization_keeps_the_kernel_and_one_value_per_output():
    kernel = normal(1, 3, 3, 8, 16)
    largest, *others = sizes_kept(standardize, kernel)
    assert largest == kernel.size
    assert max(others) <= 16
