"""The main promise: the step does not depend on the split over devices and micro-batches."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from oracles import relative_difference
from tiny_network import TinyNet, make_batch

from wsbcn_flax import BatchChannelNorm, WeightStandardization
from wsbcn_flax.models import BasicBlock, ResNet
from wsbcn_flax.tasks import Classification
from wsbcn_flax.training import MicroBatches, Partition, TrainState, make_train_step

TOLERANCE = 5e-6
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
BCN = functools.partial(BatchChannelNorm, num_groups=4, order="normalize_first")


BATCH = make_batch()


@functools.cache
def make_step(model, *, mode="jit", devices=1, **micro):
    """Returns the partition and its compiled step, shared by all tests of the same split."""
    task = Classification(model=model)
    partition = Partition(mode=mode, devices=jax.devices()[:devices])
    step = make_train_step(
        task,
        OPTIMIZER,
        transform=WeightStandardization(),
        micro_batches=MicroBatches(**micro),
        axis_name=partition.axis_name,
    )
    return partition, partition.compile(step)


@functools.cache
def initial_state(model):
    init = jax.jit(Classification(model=model).init)
    return TrainState.create(init(jax.random.key(0), BATCH), OPTIMIZER)


@functools.cache
def state_after_one_step(model):
    """Returns a state whose estimates, momentum and zero-initialized scales have moved."""
    partition, step = make_step(model)
    state, _ = step(partition.place_state(initial_state(model)), partition.place_batch(BATCH))
    return jax.device_get(state)


def one_step(model, batch=BATCH, **split):
    """Takes one step; returns parameters, batch_stats, momentum (for the gradient) and metrics."""
    partition, step = make_step(model, **split)
    state = partition.place_state(state_after_one_step(model))
    state, metrics = step(state, partition.place_batch(batch))
    return jax.device_get((state.params, state.batch_stats, state.opt_state, metrics))


SPLITS = [
    {"count": 4, "loop": "unroll"},
    {"count": 16, "loop": "scan"},
    {"count": 16, "loop": "vmap"},
    {"mode": "shard_map", "devices": 8},
    {"mode": "shard_map", "devices": 8, "count": 2, "loop": "scan"},
    {"mode": "shard_map", "devices": 2, "count": 4, "loop": "unroll"},
    {"mode": "pmap", "devices": 8, "count": 2, "loop": "scan"},
    {"mode": "jit", "devices": 8, "count": 2, "loop": "vmap"},
]


TINY = TinyNet(BCN)
# Groups have several channels: with one channel, a batch scale's gradient is only rounding.
RESNET = ResNet(
    stage_sizes=(1,), features=16, stem_features=8, block=BasicBlock, num_classes=10, norm=BCN
)
RESNET_SPLIT = {"mode": "shard_map", "devices": 8, "count": 2, "loop": "vmap"}
OTHERS = {
    "batch_norm": TinyNet(functools.partial(nn.BatchNorm, momentum=0.9)),
    "bcn_batch": TinyNet(functools.partial(BatchChannelNorm, num_groups=4, statistics="batch")),
    "bcn_update_first": TinyNet(
        functools.partial(BatchChannelNorm, num_groups=4, order="update_first")
    ),
}


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_split_gives_the_same_step(split):
    assert relative_difference(one_step(TINY), one_step(TINY, **split)) < TOLERANCE


@pytest.mark.parametrize(
    "micro",
    [{"count": 2, "loop": "vmap"}, {"count": 2, "loop": "scan"}],
    ids=lambda micro: micro["loop"],
)
def test_shard_map_may_check_what_devices_share(micro, mesh8):
    """With `check_vma`, its default, JAX adds up gradients of shared parameters by itself."""
    step = make_train_step(
        Classification(model=TINY),
        OPTIMIZER,
        transform=WeightStandardization(),
        micro_batches=MicroBatches(**micro),
        axis_name="data",
    )
    sharded = jax.shard_map(step, mesh=mesh8, in_specs=(P(), P("data")), out_specs=P())
    state, metrics = jax.jit(sharded)(state_after_one_step(TINY), BATCH)
    actual = jax.device_get((state.params, state.batch_stats, state.opt_state, metrics))
    assert relative_difference(one_step(TINY), actual) < TOLERANCE


def test_a_split_gives_the_same_step_of_a_resnet():
    assert relative_difference(one_step(RESNET), one_step(RESNET, **RESNET_SPLIT)) < TOLERANCE


def test_few_samples_are_rounded_as_many_are_in_bfloat16():
    """If one activation is rounded differently, later ones may differ by 1e-3, as with GN.

    With a barrier before few samples, XLA for CPU rounded differently; the difference was 4e-2.
    """
    model = TinyNet(functools.partial(BCN, dtype=jnp.bfloat16))
    batch = {**BATCH, "image": BATCH["image"].astype(jnp.bfloat16)}
    many, few = one_step(model, batch), one_step(model, batch, count=4, loop="unroll")
    assert relative_difference(many, few) < 2e-3


@pytest.mark.parametrize("model", OTHERS.values(), ids=OTHERS)
def test_the_others_depend_on_the_split(model):
    """A negative control of the tolerance above."""
    split = one_step(model, count=4, loop="vmap")
    assert relative_difference(one_step(model), split) > 1e-3


@pytest.mark.parametrize(
    ("loops", "options"),
    [(("scan", "unroll", "vmap"), {}), (("scan", "unroll"), {"batch_stats": "carry"})],
    ids=["average", "carry"],
)
def test_loops_agree(loops, options):
    """Even if statistics depend on the split, scan, unroll and vmap agree."""
    model = OTHERS["bcn_update_first"]
    first, *runs = (one_step(model, count=4, loop=loop, **options) for loop in loops)
    for run in runs:
        assert relative_difference(first, run) < TOLERANCE


def test_carry_is_one_update_per_micro_batch():
    """Carried statistics equal those of applying the model to the micro-batches in turn."""
    model = OTHERS["bcn_update_first"]
    _, after, *_ = one_step(model, count=4, loop="scan", batch_stats="carry")
    state = state_after_one_step(model)
    params, stats = WeightStandardization()(state.params), state.batch_stats
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    for index in range(4):
        variables = {"params": params, "batch_stats": stats}
        _, updates = apply(variables, BATCH["image"][index::4])
        stats = updates["batch_stats"]
    chex.assert_trees_all_close(after, stats, rtol=1e-5, atol=1e-6)
    assert float(after["norm1"]["count"] - state.batch_stats["norm1"]["count"]) == 4


def compiled_step(model, **split):
    partition, step = make_step(model, **split)
    state = partition.place_state(initial_state(model))
    return step.lower(state, partition.place_batch(BATCH)).compile().as_text()


def count_operations(hlo, name):
    return sum(f" {name}(" in line or f" {name}-start(" in line for line in hlo.splitlines())


ON_DEVICES = [split for split in SPLITS if split.get("mode") == "shard_map"]


@pytest.mark.parametrize(
    ("model", "split"),
    [*((TINY, split) for split in ON_DEVICES), (RESNET, RESNET_SPLIT)],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else type(v).__name__,
)
def test_one_all_reduce(model, split):
    """Gradients, statistics and metrics of the steps above travel together."""
    hlo = compiled_step(model, **split)
    assert count_operations(hlo, "all-reduce") == 1
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert count_operations(hlo, other) == 0


def test_synchronized_batch_norm_needs_many():
    """A negative control of the count above."""
    model = TinyNet(functools.partial(nn.BatchNorm, axis_name="data"))
    hlo = compiled_step(model, mode="shard_map", devices=8)
    assert count_operations(hlo, "all-reduce") > 3


def test_transform_runs_once_however_many_micro_batches():
    """Standardization, forward and backward, stays outside the loop over micro-batches."""
    calls = []

    def transform(params):
        calls.append(None)
        return WeightStandardization()(params)

    task = Classification(model=TINY)
    step = make_train_step(
        task,
        OPTIMIZER,
        transform=transform,
        micro_batches=MicroBatches(count=2, loop="unroll"),
    )
    jax.eval_shape(step, initial_state(TINY), BATCH)
    assert len(calls) == 1


def test_pull_back_equals_the_gradient_through_the_transform():
    task, ws, state = Classification(model=TINY), WeightStandardization(), initial_state(TINY)

    def loss(params):
        return task.loss(ws(params), state.batch_stats, BATCH, rng=jax.random.key(0))[0]

    expected = jax.jit(jax.grad(loss))(state.params)
    partition, step = make_step(TINY, count=16, loop="vmap")
    after, _ = step(partition.place_state(state), partition.place_batch(BATCH))
    # The first step's momentum is its gradient.
    chex.assert_trees_all_close(after.opt_state[0].trace, expected, rtol=1e-4, atol=1e-6)


def test_dropout_differs_between_steps_devices_and_micro_batches(mesh8):
    """Each gets its own random numbers from the step's seed."""
    drawn = []

    def loss_fn(params, batch_stats, batch, *, rng):
        bits = jax.random.uniform(rng)
        return params["w"] * bits, (batch_stats, {"draw": bits})

    def spy(params, batch_stats, batch, *, rng):
        jax.debug.callback(lambda bits: drawn.append(float(bits)), jax.random.uniform(rng))
        return loss_fn(params, batch_stats, batch, rng=rng)

    partition = Partition(devices=list(mesh8.devices.flat))
    sgd = optax.sgd(0.1)
    step = partition.compile(
        make_train_step(
            spy,
            sgd,
            micro_batches=MicroBatches(count=2, loop="unroll"),
            axis_name=partition.axis_name,
        )
    )
    state = partition.place_state(TrainState.create({"params": {"w": jnp.ones(())}}, sgd))
    for _ in range(2):
        state, _ = step(state, partition.place_batch({"x": np.zeros(16, np.float32)}))
    jax.effects_barrier()
    assert len(drawn) == 32
    assert len(set(drawn)) == 32
