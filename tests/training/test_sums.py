import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from wsbcn_flax.training import Partition, TrainState, make_train_step
from wsbcn_flax.training._sums import sum_over_devices


def tree():
    rng = np.random.default_rng(0)
    return {
        "kernels": [jnp.asarray(rng.normal(size=(8, 3, 2)), jnp.float32) for _ in range(2)],
        "scale": jnp.asarray(rng.normal(size=(8, 5)), jnp.bfloat16),
        "bias": jnp.asarray(rng.normal(size=(8, 7)), jnp.float32),
        "loss": jnp.asarray(rng.normal(size=(8,)), jnp.float32),
    }


def on_devices(mesh, mean):
    """Applies the function to each device's own row of every array."""
    own = lambda arrays: mean(jax.tree.map(lambda x: x[0], arrays))  # noqa: E731
    return jax.shard_map(own, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)


def test_is_the_sum_of_every_array_in_its_own_dtype(mesh8):
    arrays = tree()
    actual = jax.jit(on_devices(mesh8, lambda t: sum_over_devices(t, "data")))(arrays)
    for total, array in zip(jax.tree.leaves(actual), jax.tree.leaves(arrays), strict=True):
        assert (total.shape, total.dtype) == (array.shape[1:], array.dtype)
        tolerance = 64 * float(jnp.finfo(array.dtype).eps)
        expected = np.asarray(array, np.float64).sum(0)
        np.testing.assert_allclose(np.asarray(total, np.float64), expected, atol=tolerance)


def test_gradients_of_matrices_alone_are_added_up_in_another_dtype(mesh8):
    """Statistics that are matrices, such as those of stacked layers, keep their dtype."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 2), "bias": (7,), "stacked": (2, 5)}
    batch = {k: rng.normal(size=(8, *shape)).astype(np.float32) for k, shape in shapes.items()}

    def loss_fn(params, batch_stats, batch, *, rng):
        """A loss whose gradients, like its statistics, are the means of the batch."""
        means = jax.tree.map(lambda x: x.mean(0), batch)
        loss = sum(jnp.vdot(params[name], means[name]) for name in params)
        return loss, ({"stacked": means["stacked"]}, {})

    partition = Partition(devices=list(mesh8.devices.flat))
    axis = partition.axis_name
    optimizer = optax.sgd(1.0)
    step = make_train_step(loss_fn, optimizer, axis_name=axis, reduce_dtype=jnp.bfloat16)
    params = {name: jnp.zeros(shapes[name]) for name in ("kernel", "bias")}
    stats = {"stacked": jnp.zeros(shapes["stacked"])}
    state = TrainState.create({"params": params, "batch_stats": stats}, optimizer)
    step = partition.compile(step, donate_state=False)
    arguments = partition.place_state(state), partition.place_batch(batch)
    sent = re.findall(
        r"all_reduce.*?-> tensor<([^>]*)>", step.lower(*arguments).as_text(), re.DOTALL
    )
    assert sorted(sent) == ["2x5xf32", "3x2xbf16", "9xf32"]  # 9: bias (7), loss, its weight.
    new, _ = step(*arguments)
    for name, mean in (new.params | new.batch_stats).items():
        assert mean.dtype == jnp.float32
        narrow = name == "kernel"
        tolerance = 8 * float(jnp.finfo(jnp.bfloat16 if narrow else mean.dtype).eps)
        expected = np.asarray(batch[name], np.float64).mean(0)
        sign = 1 if name == "stacked" else -1
        error = np.abs(sign * np.asarray(mean, np.float64) - expected).max()
        assert error <= tolerance, name
        assert (error > 1e-5) == narrow, name


def test_a_dtype_to_reduce_in_needs_an_axis():
    with pytest.raises(ValueError, match="reduce_dtype is for a step that reduces"):
        make_train_step(lambda *_: None, optax.sgd(0.1), reduce_dtype=jnp.bfloat16)


def test_scalars_and_vectors_travel_as_one(mesh8):
    """The all-reduce has an operand for each kernel, and one for all other arrays together."""

    def operands(mean):
        hlo = jax.jit(on_devices(mesh8, mean)).lower(tree()).as_text()
        return hlo.count("stablehlo.all_reduce")

    assert operands(lambda t: sum_over_devices(t, "data")) == 3
    assert operands(lambda t: lax.psum(t, "data")) == 5
