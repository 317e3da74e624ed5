"""Eight devices train like one, in every mode and with every normalization that allows it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from tiny_network import TinyNet, make_batch

from wsbcn_flax import BatchChannelNorm, WeightStandardization
from wsbcn_flax.tasks import Classification
from wsbcn_flax.training import (
    Checkpointer,
    Partition,
    TrainState,
    evaluate,
    make_eval_step,
    make_train_step,
)

STEPS = 5
TOLERANCE = 5e-6  # Relative error allowed per step.
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


class Norm(NamedTuple):
    """A normalization, the modes that must equal one device, and whether it takes an axis_name."""

    make: Callable[..., nn.Module]
    modes: tuple[str, ...]
    synced: bool = False


BCN = functools.partial(BatchChannelNorm, num_groups=4)
NORMS = {
    "bn_synced": Norm(nn.BatchNorm, ("jit", "shard_map"), synced=True),
    "gn": Norm(functools.partial(nn.GroupNorm, num_groups=4), ("shard_map",)),
    "in": Norm(functools.partial(nn.GroupNorm, num_groups=None, group_size=1), ("shard_map",)),
    "bcn": Norm(BCN, ("jit", "shard_map", "pmap")),
    "bcn_update_first_synced": Norm(
        functools.partial(BCN, order="update_first"), ("shard_map",), synced=True
    ),
    "bcn_batch_synced": Norm(
        functools.partial(BCN, statistics="batch"), ("jit", "shard_map"), synced=True
    ),
}


def make_task(name, axis_name=None):
    norm = NORMS[name]
    make = functools.partial(norm.make, axis_name=axis_name) if norm.synced else norm.make
    return Classification(model=TinyNet(make, features=16))


@functools.cache
def initial_state(name):
    init = jax.jit(make_task(name).init)
    return TrainState.create(init(jax.random.key(0), make_batch()), OPTIMIZER)


@functools.cache
def partition_and_step(name, mode, devices=8, *, synced=True, shard_optimizer=False):
    """Compiles a step once for all tests that use it."""
    partition = Partition(
        mode=mode, devices=jax.devices()[:devices], shard_optimizer=shard_optimizer
    )
    step = make_train_step(
        make_task(name, partition.axis_name if synced else None),
        OPTIMIZER,
        transform=WeightStandardization(),
        axis_name=partition.axis_name,
    )
    return partition, partition.compile(step)


def course(name, *split, **options):
    """Yields the results of every step."""
    partition, step = partition_and_step(name, *split, **options)
    state = partition.place_state(initial_state(name))
    for number in range(STEPS):
        state, metrics = step(state, partition.place_batch(make_batch(number)))
        yield jax.device_get((state.params, state.batch_stats, state.opt_state, metrics))


@functools.cache
def course_alone(name):
    return list(course(name, "jit", 1))


def relative_difference(one, other):
    """Returns the largest |a - b| / |a| of parameters, statistics, momentum and metrics.

    Each |a| is the 2-norm of a whole tree, since the gradient of a bias before another
    normalization nearly cancels.
    """
    norms = [
        [np.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in jax.tree.leaves(t))) for t in trees]
        for trees in (jax.tree.map(np.subtract, one, other), one)
    ]
    return max(d / n for d, n in zip(*norms, strict=True) if n)


def assert_same_course(compilations, name, *split, **options):
    steps = course(name, *split, **options)
    taken = [next(steps)]
    compilations.clear()
    taken += steps
    assert compilations == []
    found = list(map(relative_difference, course_alone(name), taken))
    assert all(d < number * TOLERANCE for number, d in enumerate(found, start=1)), found


@pytest.fixture
def compilations():
    """Names of the programs compiled since the list was cleared."""
    compiled = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, norm in NORMS.items() for mode in norm.modes]
)
def test_eight_devices_equal_one(name, mode, compilations):
    """Several steps agree, and only the first compiles."""
    assert_same_course(compilations, name, mode)


@pytest.mark.parametrize("name", ["bn_synced", "bcn_batch_synced"])
def test_local_statistics_differ(name):
    """A negative control of the equality above."""
    partition, step = partition_and_step(name, "shard_map", synced=False)
    state = partition.place_state(initial_state(name))
    state, metrics = step(state, partition.place_batch(make_batch()))
    taken = jax.device_get((state.params, state.batch_stats, state.opt_state, metrics))
    assert relative_difference(course_alone(name)[0], taken) > 1e-3


def test_a_sharded_optimizer_takes_the_same_steps(compilations):
    partition, _ = partition_and_step("bcn", "jit", shard_optimizer=True)
    state = partition.place_state(initial_state("bcn"))
    kernel = state.opt_state[0].trace["conv2"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 8, 2)}
    assert_same_course(compilations, "bcn", "jit", shard_optimizer=True)


def test_a_sharded_optimizer_holds_a_share_of_the_state():
    bytes_held = []
    for options in ({}, {"shard_optimizer": True}):
        partition, step = partition_and_step("bcn", "jit", **options)
        state = partition.place_state(initial_state("bcn"))
        lowered = step.lower(state, partition.place_batch(make_batch()))
        bytes_held.append(lowered.compile().memory_analysis().argument_size_in_bytes)
    momentum = sum(leaf.nbytes for leaf in jax.tree.leaves(initial_state("bcn").opt_state))
    assert bytes_held[0] - bytes_held[1] > 0.8 * 7 / 8 * momentum


def test_a_sharded_optimizer_evaluates_and_survives_a_checkpoint(tmp_path):
    partition = Partition(mode="jit", shard_optimizer=True)
    state = partition.place_state(initial_state("bcn"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        restored = checkpointer.restore_latest(state).state
    assert jax.tree.map(lambda x: x.sharding, restored) == partition.state_shardings(state)
    task = make_task("bcn")
    batch = {**make_batch(), "mask": np.ones(16, np.float32)}
    eval_step = partition.compile(make_eval_step(task), donate_state=False)
    alone = evaluate(jax.jit(make_eval_step(task)), initial_state("bcn"), [batch])
    shared = evaluate(eval_step, restored, [partition.place_batch(batch)])
    assert shared == pytest.approx(alone, rel=TOLERANCE)


def test_sharding_the_optimizer_needs_jit():
    with pytest.raises(ValueError, match=r'needs mode="jit".*received'):
        Partition(mode="shard_map", shard_optimizer=True)


@pytest.fixture(scope="module")
def saved_on_eight(tmp_path_factory):
    """A checkpoint of step 2, and the loss of every step of the uninterrupted run."""
    partition, step = partition_and_step("bcn", "shard_map")
    state = partition.place_state(initial_state("bcn"))
    folder, losses = tmp_path_factory.mktemp("checkpoints"), []
    with Checkpointer(folder) as checkpointer:
        for number in range(STEPS):
            if number == 2:
                checkpointer.save(number, state)
            state, metrics = step(state, partition.place_batch(make_batch(number)))
            losses.append(float(metrics["loss"]))
    return folder, losses


@pytest.mark.parametrize("devices", [1, 4])
def test_a_checkpoint_of_eight_devices_goes_on_with_fewer(devices, saved_on_eight):
    folder, losses = saved_on_eight
    partition, step = partition_and_step("bcn", "shard_map", devices)
    with Checkpointer(folder) as checkpointer:
        restored = checkpointer.restore_latest(partition.place_state(initial_state("bcn")))
    assert restored.step == 2
    state, resumed = restored.state, []
    for number in range(restored.step, STEPS):
        state, metrics = step(state, partition.place_batch(make_batch(number)))
        resumed.append(float(metrics["loss"]))
    np.testing.assert_allclose(resumed, losses[2:], rtol=1e-5)
