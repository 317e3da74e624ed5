import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsbcn_flax.training import Partition

MODES = ["jit", "shard_map", "pmap"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("devices", [1, 4, 8])
def test_modes_agree(mode, devices):
    partition = Partition(mode=mode, devices=jax.devices()[:devices])
    name = partition.axis_name

    def step(state, batch):
        total = jnp.mean(batch["x"])
        return state + (total if name is None else jax.lax.pmean(total, name)), {"total": state}

    compiled = partition.compile(step)
    batch = partition.place_batch({"x": np.arange(8, dtype=np.float32)})
    state = partition.place_state(jnp.float32(1))
    for _ in range(2):
        state, metrics = compiled(state, batch)
    assert (float(state), float(metrics["total"])) == (8.0, 4.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("devices", [1, 8])
def test_the_callers_state_survives_donation(mode, devices):
    partition = Partition(mode=mode, devices=jax.devices()[:devices])
    compiled = partition.compile(lambda state, batch: (state + 1, {}))
    original = jnp.zeros(1000)
    placed = partition.place_state(original)
    compiled(placed, partition.place_batch({"x": np.zeros(8, np.float32)}))
    assert placed.is_deleted() == (mode != "pmap")
    np.testing.assert_array_equal(original, 0)


def test_evaluation_does_not_donate():
    partition = Partition()
    compiled = partition.compile(
        lambda state, batch: jax.lax.psum(state * batch["x"].sum(), "data"), donate_state=False
    )
    state = partition.place_state(jnp.ones(()))
    for _ in range(2):
        assert float(compiled(state, partition.place_batch({"x": np.ones(8, np.float32)}))) == 8


def test_batch_is_split_in_order():
    partition = Partition()
    placed = partition.place_batch({"x": np.arange(16)})["x"]
    shards = sorted(placed.addressable_shards, key=lambda shard: shard.device.id)
    np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), np.arange(16))
    assert {len(shard.data) for shard in shards} == {2}


def test_refuses_an_indivisible_batch():
    with pytest.raises(ValueError, match="batch of 12 for 8 devices"):
        Partition().place_batch({"x": np.zeros(12)})
