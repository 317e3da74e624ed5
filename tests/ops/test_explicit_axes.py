"""Splitting batch, positions or channels over explicit or automatic axes changes no result."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import normal, tree_relative_error

from wsbcn_flax.ops import RunningStats, batch_channel_norm, channel_norm, standardize

SPLITS = {
    "batch": P("data"),
    "height": P(None, "data"),
    "width": P(None, None, "data"),
    "channels": P(None, None, None, "data"),
}


AXES = {"explicit": AxisType.Explicit, "automatic": AxisType.Auto}


def make_mesh(axes):
    return jax.make_mesh((4,), ("data",), axis_types=(AXES[axes],), devices=jax.devices()[:4])


def on_mesh(mesh, function, specs, arrays):
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(function)(*placed))


def loss_and_gradients(function, *primals):
    """Returns the function's outputs and the gradients of all arrays, as training needs them."""
    value = lambda *p: (jnp.sum(jnp.sin((out := function(*p))[0])), out)  # noqa: E731
    (_, out), gradients = jax.value_and_grad(
        value, argnums=tuple(range(len(primals))), has_aux=True
    )(*primals)
    return out, gradients


def bcn_step(*primals):
    def function(x, scale, mean):
        running = RunningStats(mean, jnp.full_like(mean, 2), jnp.zeros(()))
        y, new = batch_channel_norm(x, running, batch_scale=scale, num_groups=4)
        return y, new.mean, new.var

    return loss_and_gradients(function, *primals)


@pytest.mark.parametrize(
    ("axes", "split"),
    [
        *(("explicit", split) for split in SPLITS),
        ("automatic", "height"),
        ("automatic", "channels"),
    ],
)
def test_batch_channel_norm(axes, split):
    x, scale = normal(1, 4, 4, 4, 16), 1 + 0.1 * normal(2, 16)
    of_channels = P("data") if split == "channels" else P()

    arrays = (x, scale, normal(3, 16))
    expected = jax.device_get(jax.jit(bcn_step)(*arrays))
    specs = (SPLITS[split], of_channels, of_channels)
    assert tree_relative_error(on_mesh(make_mesh(axes), bcn_step, specs, arrays), expected) < 1e-5


@pytest.mark.parametrize("split", ["height", "channels"])
def test_channel_norm(split):
    def step(x):
        return loss_and_gradients(lambda x: (channel_norm(x, num_groups=4),), x)

    x, mesh = normal(1, 4, 4, 4, 16), make_mesh("explicit")
    expected = jax.device_get(jax.jit(step)(x))
    assert tree_relative_error(on_mesh(mesh, step, (SPLITS[split],), (x,)), expected) < 1e-5


def test_one_axis_manual_the_other_explicit():
    """`shard_map` over the samples alone."""
    x = normal(1, 4, 4, 4, 16)
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    expected = channel_norm(x, num_groups=4)
    with jax.set_mesh(mesh):
        of_samples = jax.shard_map(
            functools.partial(channel_norm, num_groups=4),
            in_specs=P("data"),
            out_specs=P("data"),
            axis_names={"data"},
        )
        actual = jax.jit(of_samples)(jax.device_put(x, P("data")))
    assert tree_relative_error(jax.device_get(actual), expected) < 1e-6


@pytest.mark.parametrize("spec", [P(None, None, None, "data"), P(None, None, "data")], ids=str)
def test_standardize(spec):
    def step(kernel):
        return loss_and_gradients(lambda kernel: (standardize(kernel),), kernel)

    kernel, mesh = normal(1, 3, 3, 8, 16), make_mesh("explicit")
    expected = jax.device_get(jax.jit(step)(kernel))
    assert tree_relative_error(on_mesh(mesh, step, (spec,), (kernel,)), expected) < 1e-5
