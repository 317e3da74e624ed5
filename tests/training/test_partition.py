import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsbcn_flax.training import Partition, TrainState

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
def test_options_reach_the_compiler(mode):
    """By default independent products are all in memory at once; in another order they are not."""

    def step(state, batch):
        x = jnp.mean(batch["x"]) + state
        for product in [(x + i) @ x for i in range(8)]:
            state = jnp.tanh(state @ product)
        return state, {}

    state, batch = jnp.eye(128), {"x": np.ones(8, np.float32)}
    results, temporaries = [], []
    in_order = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    for options in ({}, in_order):
        partition = Partition(mode=mode, devices=jax.devices()[:1], compiler_options=options)
        lowered = partition.compile(step).lower(state, batch)
        temporaries.append(lowered.compile().memory_analysis().temp_size_in_bytes)
        placed = partition.place_state(state), partition.place_batch(batch)
        results.append(partition.compile(step)(*placed)[0])
    np.testing.assert_allclose(*results, rtol=1e-6)
    assert temporaries[1] < temporaries[0]


def test_pmap_takes_no_compiler_options():
    with pytest.raises(ValueError, match=r"jax\.pmap takes no compiler_options, received \{'a"):
        Partition(mode="pmap", compiler_options={"a": "b"})


# --- batches and states that are not placed -----------------------------------------------------


def add_mean(partition):
    def step(state, batch):
        total = jnp.mean(batch["x"])
        name = partition.axis_name
        return state + (total if name is None else jax.lax.pmean(total, name)), {}

    return partition.compile(step, donate_state=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_uncommitted_batches_are_placed_by_the_step(mode, array):
    partition = Partition(mode=mode)
    state, _ = add_mean(partition)(jnp.float32(1), {"x": array(np.arange(8.0)), "none": None})
    assert float(state) == 4.5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("devices", [1, 8])
def test_steps_refuse_what_devices_cannot_split(mode, devices):
    partition = Partition(mode=mode, devices=jax.devices()[:devices])
    step, state = add_mean(partition), partition.place_state(jnp.float32(1))
    for take in (lambda batch: step(state, batch), partition.place_batch):
        for scalar in (1.0, np.float32(1), jnp.float32(1)):
            with pytest.raises(ValueError, match=r"leading batch axis, received batch\['x'\] of"):
                take({"x": scalar})
        with pytest.raises(ValueError, match=r"batch\['x'\]\[0\] of shape .*np\.asarray"):
            take({"x": [1.0] * 8})
        if devices > 1:
            for array in (np.zeros, jnp.zeros):
                with pytest.raises(ValueError, match=r"divide the batch.* 10 for 8 devices"):
                    take({"x": array((10, 3))})


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
@pytest.mark.parametrize("where", ["one device", "every device", "half"])
def test_steps_refuse_a_batch_that_is_committed_elsewhere(mode, where):
    shardings = {
        "one device": jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        "every device": jax.NamedSharding(Partition().mesh, jax.P()),
        "half": jax.NamedSharding(Partition(devices=jax.devices()[:4]).mesh, jax.P("data")),
    }
    partition = Partition(mode=mode)
    batch = {"x": jax.device_put(jnp.arange(8.0), shardings[where])}
    with pytest.raises(ValueError, match=r"over the 8 devices .* batch\['x'\] with .*place_batch"):
        add_mean(partition)(jnp.float32(1), batch)
    state, _ = add_mean(partition)(jnp.float32(1), partition.place_batch(jax.device_get(batch)))
    assert float(state) == 4.5


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_a_donated_state_is_refused(mode):
    """JAX itself might end the process."""
    partition = Partition(mode=mode)
    compiled = partition.compile(lambda state, batch: (jax.tree.map(jnp.negative, state), {}))
    batch = partition.place_batch({"x": np.zeros(8, np.float32)})
    for state in (jnp.ones(3), {"w": jnp.ones(3)}, TrainState(jnp.int32(0), {}, {}, ())):
        state = partition.place_state(state)
        compiled(state, batch)
        with pytest.raises(ValueError, match=r"newest state.*donate_state=False"):
            compiled(state, batch)


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_a_compiled_step_can_be_looked_into(mode):
    partition = Partition(mode=mode)
    step, arguments = add_mean(partition), (jnp.float32(1), {"x": jnp.arange(8.0)})
    assert isinstance(step, jax.stages.Wrapped)
    assert step.__name__ == "step"
    assert step.eval_shape(*arguments)[0].shape == ()
    assert step.trace(*arguments).jaxpr.in_avals[1].shape == (8,)
    assert float(step.lower(*arguments).compile()(*arguments)[0]) == 4.5
    assert float(jax.jit(step)(*arguments)[0]) == 4.5
