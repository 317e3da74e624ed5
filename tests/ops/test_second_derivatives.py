"""Gradients in closed form can be differentiated again."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from oracles import normal, tree_relative_error

from wsbcn_flax.ops import RunningStats, batch_channel_norm, channel_norm

pytestmark = pytest.mark.usefixtures("x64")


def hessian_products(function, x, scale):
    """Differentiates a gradient along a direction, in forward and in reverse mode."""
    along = (normal(5, *x.shape, dtype=x.dtype), normal(6, *scale.shape, dtype=x.dtype))

    def gradient(x, scale):
        return jax.grad(lambda *p: jnp.sum(jnp.sin(function(*p))), argnums=(0, 1))(x, scale)

    def reverse(x, scale):
        return jax.vjp(gradient, x, scale)[1](along)

    forward_over_reverse = jax.jit(lambda x, s: jax.jvp(gradient, (x, s), along)[1])(x, scale)
    return forward_over_reverse, jax.jit(reverse)(x, scale)


def flax_group_norm(y, scale):
    norm = nn.GroupNorm(4, epsilon=1e-5, use_bias=False)
    return norm.apply({"params": {"scale": scale}}, y)


def test_of_channel_norm():
    x, scale = 1 + normal(1, 2, 3, 5, 12, dtype=jnp.float64), normal(2, 12, dtype=jnp.float64)
    ours = hessian_products(functools.partial(channel_norm, num_groups=4), x, scale)
    flaxs = hessian_products(flax_group_norm, x, scale)
    assert tree_relative_error(ours, flaxs) < 1e-10
    assert tree_relative_error(*ours) < 1e-10  # A Hessian is symmetric.


@pytest.mark.parametrize("statistics", ["batch", "estimate"])
def test_of_batch_channel_norm(statistics):
    """The reference writes the batch part as a plain formula, which autodiff differentiates."""
    x, scale = 1 + normal(1, 2, 3, 5, 12, dtype=jnp.float64), normal(2, 12, dtype=jnp.float64)
    running = RunningStats(normal(3, 12, dtype=jnp.float64), jnp.full(12, 2.0), jnp.zeros(()))
    options = {"num_groups": 4, "statistics": statistics, "order": "normalize_first"}

    def ours(x, scale):
        return batch_channel_norm(x, running, batch_scale=scale, **options)[0]

    def formula(x, scale):
        batch = statistics == "batch"
        mean = x.mean((0, 1, 2)) if batch else running.mean
        var = x.var((0, 1, 2)) if batch else running.var
        y = (x - mean[None, None, None]) * (scale / jnp.sqrt(var + 1e-5))[None, None, None]
        return flax_group_norm(y, jnp.ones(12))

    products = hessian_products(ours, x, scale)
    assert tree_relative_error(products, hessian_products(formula, x, scale)) < 1e-10
