import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checkpoint_states import State, bits, make_state, train_step
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wsbcn_flax.training.checkpoints import (
    Checkpointer,
)

# --- what is restored is what was saved ---------------------------------------------------------

EXTREMES = {
    "float32": np.array([0.0, -0.0, 1e-45, 3.4e38, 1 / 3], np.float32),
    "bfloat16": np.array([0.0, -0.0, 1e-40, 3e38, 1 / 3], ml_dtypes.bfloat16),
    "float16": np.array([-0.0, 6e-8, 65504], np.float16),
    "int32": np.array([-(2**31), 2**31 - 1], np.int32),
    "uint8": np.arange(256, dtype=np.uint8),
    "bool": np.array([[True, False], [False, True]]),
    "complex64": np.array([1 - 2j, -0.0], np.complex64),
}
WIDE = {
    "float64": np.array([-0.0, 5e-324, 1.7e308, 1 / 3]),
    "int64": np.array([-(2**63), 2**63 - 1]),
}


def assert_round_trip(directory: Path, values: np.ndarray) -> None:
    state = {
        "vector": jnp.asarray(values),
        "scalar": jnp.asarray(values.reshape(-1)[-1]),
    }
    assert state["vector"].dtype == values.dtype
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(0, state)
        restored = checkpointer.restore(0, jax.eval_shape(lambda: state))
    assert bits(restored.state) == bits(state)


@pytest.mark.parametrize("dtype", EXTREMES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    assert_round_trip(tmp_path, EXTREMES[dtype])


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.usefixtures("x64")
def test_wide_dtypes_come_back_bit_for_bit(tmp_path, dtype):
    assert_round_trip(tmp_path, WIDE[dtype])


def test_float64_is_never_narrowed_silently(tmp_path):
    with jax.enable_x64(True):
        state = {"x": jnp.full(3, 1 / 3, jnp.float64)}
        template = jax.eval_shape(lambda: state)
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(0, state)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match="enable_x64"):
        checkpointer.restore(0, template)


class Pair(NamedTuple):
    first: Any
    second: Any


def test_the_container_comes_back(tmp_path):
    state = {
        "a.b/c": Pair([jnp.ones(2), ()], None),
        "tuple": (jnp.zeros(1), {}, optax.EmptyState()),
        "state": make_state(3),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state)
        restored = checkpointer.restore_latest(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)


def test_the_newest_step_and_its_extra_come_back(tmp_path):
    extra = {"best": 0.1, "history": [1, 2.5, None, True, "é"], "nested": {"a": {}}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(np.int64(9), make_state(9))
        checkpointer.save(jnp.int32(10), make_state(10), extra=extra)
    with Checkpointer(tmp_path) as checkpointer:
        step, state, saved_extra = checkpointer.restore_latest(make_state(0))
        older = checkpointer.restore(9, make_state(0))
    assert (step, bits(state)) == (10, bits(make_state(10)))
    assert saved_extra == extra
    assert (older.step, older.extra, bits(older.state)) == (9, {}, bits(make_state(9)))


def test_extra_may_change_once_it_is_being_saved(tmp_path, monkeypatch):
    extra, save = {"history": [1]}, ocp.CheckpointManager.save

    def save_late(*args, **kwargs):
        extra["history"].append(2)
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save_late)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), extra=extra)
        assert checkpointer.restore(1, make_state(0)).extra == {"history": [1]}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    batches = jax.random.normal(jax.random.key(0), (6, 8, 4))
    donating_step = jax.jit(train_step, donate_argnums=0)
    expected = make_state(0)
    for batch in batches:
        expected = train_step(expected, batch)

    state = make_state(0)
    with Checkpointer(tmp_path) as checkpointer:
        for batch in batches[:3]:
            state = donating_step(state, batch)
            checkpointer.save(int(state.step), state)
    with Checkpointer(tmp_path) as checkpointer:
        step, state, _ = checkpointer.restore_latest(make_state(1))
    for batch in batches[step:]:
        state = donating_step(state, batch)
    assert bits(state) == bits(expected)


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    scramble = jax.jit(lambda x: -x, donate_argnums=0)
    with Checkpointer(tmp_path, max_to_keep=None) as checkpointer:
        for step in range(4):
            x = jnp.full(1 << 21, step, jnp.float32)
            checkpointer.save(step, {"x": x})
            for _ in range(3):
                x = scramble(x)
            x.block_until_ready()
        for step in range(4):
            x = checkpointer.restore(step, {"x": x}).state["x"]
            np.testing.assert_array_equal(x, step)


# --- placement ----------------------------------------------------------------------------------


def placed(state: State, devices: int) -> State:
    """Splits the last axis over devices where its size is 16, and copies other arrays to all."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))

    def place(x):
        spec = PartitionSpec(*[None] * (x.ndim - 1), "data") if x.shape[-1:] == (16,) else ()
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, state)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 8), (8, 4), (8, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_state_moves_between_device_counts(tmp_path, saved_on, restored_on, abstract):
    state = placed(make_state(1, features=16), saved_on)
    template = placed(make_state(2, features=16), restored_on)
    assert len(state.params["conv"]["kernel"].sharding.device_set) == saved_on
    if abstract:
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template
        )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        restored = checkpointer.restore_latest(template).state
    assert bits(restored) == bits(state)
    for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
        assert leaf.sharding == like.sharding


def test_uncommitted_leaves_stay_free_to_move(tmp_path, mesh8):
    sharded = jax.device_put(jnp.arange(16.0), NamedSharding(mesh8, PartitionSpec("data")))
    state = {"step": jnp.int32(4), "x": sharded}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, state)
        restored = checkpointer.restore_latest(state).state
    # jit refuses arrays committed to different devices.
    total = jax.jit(lambda s: s["x"] * s["step"])(restored)
    np.testing.assert_array_equal(total, 4 * np.arange(16.0))
    assert not restored["step"].committed
    assert restored["x"].committed


@pytest.mark.parametrize("dtype", EXTREMES)
def test_numpy_arrays_come_back_as_arrays_of_jax(tmp_path, dtype):
    values = EXTREMES[dtype]
    state = {
        "vector": values,
        "scalar": values.reshape(-1)[-1],
        "strided": np.stack([values, values])[:, ::-1].T,
        "jax": jnp.asarray(values),
    }
    assert isinstance(state["scalar"], np.generic)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        restored = checkpointer.restore(0, state).state
        assert bits(checkpointer.restore(0, jax.eval_shape(lambda: state)).state) == bits(state)
    assert bits(restored) == bits(state)
    for leaf in jax.tree.leaves(restored):
        assert isinstance(leaf, jax.Array)
        assert leaf.devices() == {jax.devices()[0]}
        assert not leaf.committed


def test_numpy_and_jax_arrays_are_templates_of_each_other(tmp_path):
    for step, state, template in [
        (1, make_state(1), jax.device_get(make_state(0))),
        (2, jax.device_get(make_state(2)), make_state(0)),
    ]:
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(step, state)
            assert bits(checkpointer.restore_latest(template).state) == bits(state)


def test_numpy_arrays_are_saved_as_they_were(tmp_path):
    x = np.ones(1 << 21, np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"x": x})
        x[:] = 2
        np.testing.assert_array_equal(checkpointer.restore(0, {"x": x}).state["x"], 1)


# --- other processes ----------------------------------------------------------------------------

TRAIN_FOREVER = """
import sys
import jax.numpy as jnp
from wsbcn_flax.training.checkpoints import Checkpointer

with Checkpointer(sys.argv[1], max_to_keep=2) as checkpointer:
    state = {"step": jnp.int32(0), "x": jnp.arange(5_000_000, dtype=jnp.float32)}
    restored = checkpointer.restore_latest(state)
    step, state = (restored.step, restored.state) if restored else (0, state)
    while True:
        step, state = step + 1, {"step": state["step"] + 1, "x": state["x"] + 1}
        checkpointer.save(step, state)
        if step % 3 == 0:
            checkpointer.wait()
            print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_sound_checkpoint(tmp_path):
    rng = random.Random(0)
    committed = 0
    template = {"step": jnp.int32(0), "x": jnp.zeros(5_000_000)}
    for _ in range(3):
        warnings = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache"]
        command = [sys.executable, *warnings, "-c", TRAIN_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            committed = int(child.stdout.readline())
            time.sleep(rng.uniform(0, 0.3))
            child.send_signal(signal.SIGKILL)
            committed = max([committed, *map(int, child.stdout.read().split())])
        assert child.returncode == -signal.SIGKILL
        with Checkpointer(tmp_path) as checkpointer:
            step, state, _ = checkpointer.restore_latest(template)
        assert step >= committed
        assert state["step"] == step
        np.testing.assert_array_equal(state["x"], np.arange(5_000_000, dtype=np.float32) + step)
