"""Scaling the loss changes nothing in float32, and keeps gradients that float16 would lose."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

from wsbcn_flax.training import Checkpointer, MicroBatches, Partition, TrainState, make_train_step

OPTIMIZER = optax.sgd(0.5, momentum=0.9)


def loss_fn(params, batch_stats, batch, *, rng):
    """Computes a mean of squares, in float16 if the batch has "half", and a batch statistic."""
    x = batch["x"].astype(jnp.float16 if "half" in batch else jnp.float32)
    error = x * params["w"].astype(x.dtype)[None] - 1
    return jnp.mean(jnp.square(error).astype(jnp.float32)), ({"mean": jnp.mean(batch["x"])}, {})


def new_state(**scale):
    variables = {
        "params": {"w": jnp.full(3, 0.5, jnp.float32)},
        "batch_stats": {"mean": jnp.zeros(())},
    }
    loss_scale = DynamicScale(**scale) if scale else None
    return TrainState.create(variables, OPTIMIZER, loss_scale=loss_scale)


def make_batch(value=0.7):
    return {"x": np.random.default_rng(0).normal(value, 1, (16, 3)).astype(np.float32)}


STEP = jax.jit(make_train_step(loss_fn, OPTIMIZER))
INTERVAL = 3


@pytest.mark.parametrize("loop", ["vmap", "scan"])
def test_a_power_of_two_changes_no_bit_in_float32(loop):
    micro_batches = MicroBatches(count=4, loop=loop)
    step = jax.jit(make_train_step(loss_fn, OPTIMIZER, micro_batches=micro_batches))
    plain, scaled = new_state(), new_state(scale=2.0**20)
    for _ in range(3):
        (plain, metrics), (scaled, with_scale) = (
            step(plain, make_batch()),
            step(scaled, make_batch()),
        )
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(scaled), strict=False):
        np.testing.assert_array_equal(one, other)
    assert float(metrics["loss"]) == float(with_scale["loss"])
    assert set(with_scale) - set(metrics) == {"loss_scale", "skipped"}


def test_a_gradient_that_float16_loses_is_kept():
    """Gradients of 3e-9 are below 6e-8, the smallest positive float16."""
    batch = {"x": np.full((16, 3), 1e-8, np.float32), "half": np.zeros(16)}

    def tiny(params, batch_stats, batch, *, rng):
        x = batch["x"].astype(jnp.float16)
        y = (params["w"].astype(jnp.float16)[None] * jnp.float16(1)) * jnp.ones_like(x)
        return jnp.mean(y.astype(jnp.float32)) * 1e-8, (batch_stats, {})

    step = jax.jit(make_train_step(tiny, OPTIMIZER))
    _, lost = step(new_state(), batch)
    _, kept = step(new_state(scale=65536.0), batch)
    assert float(lost["grad_norm"]) == 0
    assert float(kept["grad_norm"]) == pytest.approx(1e-8 / 3**0.5, rel=1e-2)


@pytest.mark.parametrize(("factor", "scale"), [(0.01, 2.0**16), (1e4, 1.0)])
def test_parameters_in_float16_are_trained(factor, scale):
    """65536, where Flax's scale starts, is not finite in float16, nor is the square of 1000."""

    def loss_fn(params, batch_stats, batch, *, rng):
        return factor * jnp.mean(params["w"].astype(jnp.float32)), (batch_stats, {})

    state = TrainState.create(
        {"params": {"w": jnp.ones(4, jnp.float16)}}, OPTIMIZER, loss_scale=DynamicScale()
    )
    state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(scale)))
    state, metrics = jax.jit(make_train_step(loss_fn, OPTIMIZER))(state, make_batch())
    assert float(metrics["skipped"]) == 0
    assert float(metrics["grad_norm"]) == pytest.approx(factor / 2, rel=1e-3)
    np.testing.assert_allclose(state.params["w"], 1 - 0.5 * factor / 4, rtol=1e-3)


def test_a_step_that_overflows_is_skipped_and_the_scale_recovers():
    state = new_state(scale=2.0**127)
    scales, skipped = [], []
    for _ in range(15):
        before = state
        state, metrics = STEP(state, make_batch(100.0))
        assert int(state.step) == int(before.step) + 1
        assert np.isfinite([float(value) for value in metrics.values()]).all()
        scales.append(float(metrics["loss_scale"]))
        skipped.append(float(metrics["skipped"]))
        if skipped[-1]:
            for name in ("params", "batch_stats", "opt_state"):
                jax.tree.map(
                    np.testing.assert_array_equal, getattr(before, name), getattr(state, name)
                )
        else:
            break
    # The scale halves at each overflow.
    overflows = int(sum(skipped))
    assert overflows >= 2
    assert skipped[:overflows] == [1.0] * overflows
    assert scales[: overflows + 1] == [2.0 ** (127 - k) for k in range(overflows + 1)]


def test_the_scale_grows_after_enough_finite_steps():
    state = new_state(scale=4.0, growth_interval=INTERVAL)
    chex.clear_trace_counter()
    # Any trace after the first raises.
    step = jax.jit(chex.assert_max_traces(make_train_step(loss_fn, OPTIMIZER), n=1))
    scales = []
    for _ in range(2 * INTERVAL + 3):
        state, metrics = step(state, make_batch())
        scales.append(float(metrics["loss_scale"]))
    assert scales == [4.0] * (INTERVAL + 1) + [8.0] * (INTERVAL + 1) + [16.0]


@pytest.mark.parametrize("mode", ["shard_map", "jit"])
def test_an_overflow_on_one_device_skips_the_step_on_all(mode):
    partition = Partition(mode=mode)
    step = partition.compile(make_train_step(loss_fn, OPTIMIZER, axis_name=partition.axis_name))
    batch = make_batch()
    batch["x"][-1] = 1e30  # Its square overflows, on the last device.
    state = partition.place_state(new_state(scale=2.0**100))
    state, metrics = step(state, partition.place_batch(batch | {"x": batch["x"]}))
    assert float(metrics["skipped"]) == 1
    np.testing.assert_array_equal(state.params["w"], np.full(3, 0.5, np.float32))
    shards = [float(shard.data) for shard in state.loss_scale.scale.addressable_shards]
    assert shards == [2.0**99] * 8


def test_the_scale_is_saved(tmp_path):
    state, _ = STEP(new_state(scale=2.0**10), make_batch())
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        restored = checkpointer.restore_latest(new_state(scale=1.0)).state
    assert float(restored.loss_scale.scale) == 2.0**10
    assert int(restored.loss_scale.fin_steps) == 1
