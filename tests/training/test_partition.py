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


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_compact_is_the_same_step_in_less_memory(mode):
    """Products that do not depend on each other would all be held at once."""

    def step(state, batch):
        x = jnp.mean(batch["x"]) + state
        for product in [(x + i) @ x for i in range(8)]:
            state = jnp.tanh(state @ product)
        return state, {}

    state, batch = jnp.eye(128), {"x": np.ones(8, np.float32)}
    results, temporaries = [], []
    for compact in (False, True):
        partition = Partition(mode=mode, devices=jax.devices()[:1], compact=compact)
        lowered = partition.compile(step).lower(state, batch)
        temporaries.append(lowered.compile().memory_analysis().temp_size_in_bytes)
        placed = partition.place_state(state), partition.place_batch(batch)
        results.append(partition.compile(step)(*placed)[0])
    np.testing.assert_allclose(*results, rtol=1e-6)
    assert temporaries[1] < temporaries[0]


def test_pmap_cannot_be_compact():
    with pytest.raises(ValueError, match=r'jax\.pmap does not take.*received "pmap"'):
        Partition(mode="pmap", compact=True)
