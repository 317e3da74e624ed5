"""Eight devices train as one does, in every mode and with every normalization that allows it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from wsbcn_flax import BatchChannelNorm, WeightStandardization
from wsbcn_flax.models import BasicBlock, ResNet
from wsbcn_flax.tasks import Classification
from wsbcn_flax.training import (
    Checkpointer,
    MicroBatches,
    Partition,
    TrainState,
    evaluate,
    make_eval_step,
    make_train_step,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 5
TOLERANCE = 5e-6  # Relative, for each step taken.
# At twice this rate GroupNorm's courses part by twenty times their rounding after one step, on some
# machines: probably an activation that crosses the kink of its ReLU in one of them.
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


class Norm(NamedTuple):
    """A normalization, modes that must equal one device, and whether it syncs where it can."""

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
    model = ResNet(
        stage_sizes=(1, 1), features=8, block=BasicBlock, num_classes=10, stem_features=8, norm=make
    )
    return Classification(model=model)


def make_batch(seed, size=16):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(0.5, 2.0, (size, 32, 32, 3)).astype(np.float32),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }


@functools.cache
def initial_state(name):
    init = jax.jit(make_task(name).init)
    return TrainState.create(init(jax.random.key(0), make_batch(0)), OPTIMIZER)


def make_step(name, partition, **micro):
    return partition.compile(
        make_train_step(
            make_task(name, partition.axis_name),
            OPTIMIZER,
            transform=WeightStandardization(),
            axis_name=partition.axis_name,
            micro_batches=MicroBatches(**micro),
        )
    )


def course(name, partition):
    """What every step returned."""
    step, state = make_step(name, partition), partition.place_state(initial_state(name))
    for number in range(STEPS):
        state, metrics = step(state, partition.place_batch(make_batch(number)))
        yield jax.device_get((state.params, state.batch_stats, state.opt_state, metrics))


@functools.cache
def course_alone(name):
    return list(course(name, Partition(mode="jit", devices=jax.devices()[:1])))


def relative_difference(one, other):
    """Largest |a - b| / |a| of parameters, statistics, momentum and metrics, in 2-norms.

    Of each as a whole: a bias before another normalization has a gradient that nearly cancels.
    """
    norms = [
        [np.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in jax.tree.leaves(t))) for t in trees]
        for trees in (jax.tree.map(np.subtract, one, other), one)
    ]
    return max(d / n for d, n in zip(*norms, strict=True) if n)


def assert_same_course(name, partition, compilations):
    steps = course(name, partition)
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
    """Several steps are the same, and only the first compiles."""
    assert_same_course(name, Partition(mode=mode), compilations)


@pytest.mark.parametrize("name", ["bn_synced", "bcn_batch_synced"])
def test_local_statistics_differ(name):
    """What shows that the equality above tells something."""
    partition = Partition(mode="shard_map")
    unsynced = Classification(model=make_task(name).model)
    step = partition.compile(make_train_step(unsynced, OPTIMIZER, axis_name=partition.axis_name))
    state = partition.place_state(initial_state(name))
    state, metrics = step(state, partition.place_batch(make_batch(0)))
    taken = jax.device_get((state.params, state.batch_stats, state.opt_state, metrics))
    assert relative_difference(course_alone(name)[0], taken) > 1e-3


def test_a_sharded_optimizer_takes_the_same_steps(compilations):
    partition = Partition(mode="jit", shard_optimizer=True)
    state = partition.place_state(initial_state("bcn"))
    kernel = state.opt_state[0].trace["stage2_block1"]["conv1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 8, 2)}
    assert_same_course("bcn", partition, compilations)


def test_a_sharded_optimizer_holds_a_share_of_the_state():
    batch = make_batch(0)
    bytes_held = {}
    for shard_optimizer in (False, True):
        partition = Partition(mode="jit", shard_optimizer=shard_optimizer)
        lowered = make_step("bcn", partition).lower(initial_state("bcn"), batch)
        bytes_held[shard_optimizer] = lowered.compile().memory_analysis().argument_size_in_bytes
    momentum = sum(leaf.nbytes for leaf in jax.tree.leaves(initial_state("bcn").opt_state))
    assert bytes_held[False] - bytes_held[True] > 0.8 * 7 / 8 * momentum


def test_a_sharded_optimizer_evaluates_and_survives_a_checkpoint(tmp_path):
    partition = Partition(mode="jit", shard_optimizer=True)
    state = partition.place_state(initial_state("bcn"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        restored = checkpointer.restore_latest(state).state
    assert jax.tree.map(lambda x: x.sharding, restored) == partition.state_shardings(state)
    task = make_task("bcn")
    batch = {**make_batch(0), "mask": np.ones(16, np.float32)}
    eval_step = partition.compile(make_eval_step(task), donate_state=False)
    alone = evaluate(jax.jit(make_eval_step(task)), initial_state("bcn"), [batch])
    shared = evaluate(eval_step, restored, [partition.place_batch(batch)])
    assert shared == pytest.approx(alone, rel=TOLERANCE)


def test_sharding_the_optimizer_needs_jit():
    with pytest.raises(ValueError, match='needs mode="jit", received'):
        Partition(mode="shard_map", shard_optimizer=True)


@pytest.fixture(scope="module")
def saved_on_eight(tmp_path_factory):
    """A checkpoint of step 2, and the loss of every step of the run that goes on from it."""
    partition = Partition(mode="shard_map")
    step, state = make_step("bcn", partition), partition.place_state(initial_state("bcn"))
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
    partition = Partition(mode="shard_map", devices=jax.devices()[:devices])
    with Checkpointer(folder) as checkpointer:
        restored = checkpointer.restore_latest(partition.place_state(initial_state("bcn")))
    assert restored.step == 2
    step, state, resumed = make_step("bcn", partition), restored.state, []
    for number in range(restored.step, STEPS):
        state, metrics = step(state, partition.place_batch(make_batch(number)))
        resumed.append(float(metrics["loss"]))
    np.testing.assert_allclose(resumed, losses[2:], rtol=1e-5)
