"""An NNX model trains by the step, loop and checkpoints that train Linen's."""

import functools
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import normal, relative_difference

import wsbcn_flax
from wsbcn_flax import WeightStandardization
from wsbcn_flax.nnx import BatchChannelNorm, Functional, load_variables, to_variables
from wsbcn_flax.nnx.models import CifarResNet
from wsbcn_flax.tasks import Classification
from wsbcn_flax.training import (
    BatchConfig,
    Experiment,
    LoopConfig,
    MicroBatches,
    Partition,
    TrainState,
    make_train_step,
)

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.normal(0.5, 2.0, (16, 8, 8, 3)).astype(np.float32),
    "label": RNG.integers(0, 10, 16).astype(np.int32),
}
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
NORM = functools.partial(BatchChannelNorm, num_groups=4)
X = normal(1, 2, 4, 4, 8)


class Tiny(nnx.Module):
    """A convolution, a normalization and a head."""

    def __init__(self, rngs, norm=NORM):
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(8, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


TINY = Functional(Tiny)
RESNET = Functional(functools.partial(CifarResNet, depth=8, width=8, norm=NORM))


@functools.cache
def make_step(model, *, mode="jit", devices=1, **micro):
    partition = Partition(mode=mode, devices=jax.devices()[:devices])
    step = make_train_step(
        Classification(model=model),
        OPTIMIZER,
        transform=WeightStandardization(),
        micro_batches=MicroBatches(**micro),
        axis_name=partition.axis_name,
    )
    return partition, partition.compile(step)


@functools.cache
def initial_state(model):
    variables = jax.jit(model.init)(jax.random.key(0))
    # Zero scales and fresh statistics would hide errors.
    leaves, structure = jax.tree.flatten(variables)
    leaves = [leaf + 0.1 * jnp.abs(normal(i, *leaf.shape)) for i, leaf in enumerate(leaves)]
    return TrainState.create(jax.tree.unflatten(structure, leaves), OPTIMIZER)


def one_step(model, **split):
    partition, step = make_step(model, **split)
    state = partition.place_state(initial_state(model))
    return jax.device_get(step(state, partition.place_batch(BATCH)))


ON_DEVICES = {"mode": "shard_map", "devices": 8, "count": 2, "loop": "vmap"}
SPLITS = {
    "scan": (TINY, {"count": 4, "loop": "scan"}),
    "jit": (TINY, {"mode": "jit", "devices": 8, "count": 2, "loop": "unroll"}),
    "resnet": (RESNET, ON_DEVICES),
}


@pytest.mark.parametrize(("model", "split"), SPLITS.values(), ids=SPLITS)
def test_every_split_gives_the_same_step(model, split):
    assert relative_difference(one_step(model), one_step(model, **split)) < 5e-6


def test_batch_norm_depends_on_the_split():
    """A negative control of the tolerance above."""
    model = Functional(functools.partial(Tiny, norm=nnx.BatchNorm))
    split = one_step(model, count=4, loop="vmap")
    assert relative_difference(one_step(model), split) > 1e-3


def test_one_all_reduce():
    partition, step = make_step(RESNET, **ON_DEVICES)
    state = partition.place_state(initial_state(RESNET))
    hlo = step.lower(state, partition.place_batch(BATCH)).compile().as_text()
    lines = [line for line in hlo.splitlines() if "=" in line]
    assert sum(" all-reduce(" in x or " all-reduce-start(" in x for x in lines) == 1
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert not any(f" {other}(" in line for line in lines)


class LinenTiny(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        norm = wsbcn_flax.BatchChannelNorm(num_groups=4, name="norm")
        x = nn.relu(norm(x, use_running_average=not train))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def test_the_step_is_that_of_the_linen_twin():
    """From the same initial state, both steps reach the same state."""
    task = Classification(model=LinenTiny())
    step = make_train_step(task, OPTIMIZER, transform=WeightStandardization())
    expected = jax.jit(step)(initial_state(TINY), BATCH)
    chex.assert_trees_all_close(one_step(TINY), expected, rtol=1e-6, atol=1e-7)


def test_trains_from_a_checkpoint_as_undisturbed(tmp_path):
    """A whole experiment: evaluation, a checkpoint, and a second run that resumes."""

    def batches(*, batch_size, start_step=0, **_):
        return iter(lambda: BATCH, None)

    data = types.SimpleNamespace(
        element_spec={n: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for n, a in BATCH.items()},
        train_batches=batches,
        eval_size=16,
        eval_batches=lambda **_: [{**BATCH, "mask": np.ones(16, np.float32)}],
        facts=dict,
    )
    experiment = Experiment(
        task=Classification(model=TINY),
        data=data,
        optimizer=OPTIMIZER,
        steps=4,
        batch=BatchConfig(size=16, micro=1),
        transform=WeightStandardization(),
    )
    program = experiment.compile()

    def run(folder, steps):
        config = LoopConfig(steps=steps, log_every=2, checkpoint_every=2, show_progress=False)
        return experiment.run(folder, config=config, program=program)

    undisturbed, metrics = run(tmp_path / "one", 4)
    run(tmp_path / "two", 2)
    resumed, again = run(tmp_path / "two", 4)
    assert int(resumed.step) == 4
    chex.assert_trees_all_equal((resumed.params, again), (undisturbed.params, metrics))
    model = Tiny(nnx.Rngs(1))
    ws = WeightStandardization()
    variables = {"params": ws(resumed.params), "batch_stats": resumed.batch_stats}
    load_variables(model, jax.device_get(variables))
    model.eval()
    wrong = jnp.mean(jnp.argmax(model(BATCH["image"]), -1) != BATCH["label"])
    assert float(wrong) == metrics["eval_error"]


def test_init_is_the_model_of_that_key():
    chex.assert_trees_all_equal(TINY.init(jax.random.key(3)), to_variables(Tiny(nnx.Rngs(3))))
    shapes = jax.eval_shape(TINY.init, jax.random.key(3), BATCH["image"])
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, TINY.init(jax.random.key(0)))


class Twice(nnx.Module):
    """A normalization that two activations share, and one in a scan over two layers."""

    def __init__(self, rngs):
        self.norm = NORM(8, rngs=rngs)
        keys = jax.random.split(rngs.params(), 2)
        self.deep = nnx.vmap(lambda key: NORM(8, rngs=nnx.Rngs(key)))(keys)

    def __call__(self, x):
        y = self.norm(x) + self.norm(2 * x)
        scan = nnx.scan(lambda h, m: m(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(y, self.deep)


class LinenTwice(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        make = functools.partial(wsbcn_flax.BatchChannelNorm, num_groups=4)
        norm = make(name="norm", use_running_average=not train)
        y = norm(x) + norm(2 * x)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, h):
                return make(name="inner", use_running_average=not train)(h), None

        axes = {"params": 0, "batch_stats": 0}
        return nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)(
            name="deep"
        )(y)[0]


def test_calls_of_a_shared_layer_are_one_update_as_in_linen():
    def linen_names(variables):
        return {
            kind: {"norm": tree["norm"], "deep": {"inner": tree["deep"]}}
            for kind, tree in variables.items()
        }

    variables = Functional(Twice).init(jax.random.key(0))
    apply = functools.partial(Functional(Twice).apply, train=True, mutable=["batch_stats"])
    y, updates = jax.jit(apply)(variables, X)
    assert float(updates["batch_stats"]["norm"]["count"]) == 1
    np.testing.assert_array_equal(updates["batch_stats"]["deep"]["count"], [1, 1])
    linen = functools.partial(LinenTwice().apply, train=True, mutable=["batch_stats"])
    expected = jax.jit(linen)(linen_names(variables), X)
    chex.assert_trees_all_close((y, linen_names(updates)), expected, rtol=1e-6, atol=1e-6)


class Random(nnx.Module):
    """A model with two dropouts, and a random table that is not trained."""

    def __init__(self, rngs):
        self.table = nnx.Variable(jax.random.normal(rngs.params(), (8,)))
        self.scale = nnx.Param(jnp.ones(8))
        self.dropouts = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        y = x * self.scale[...]
        return jnp.stack([dropout(y) for dropout in self.dropouts]) + self.table[...]


def test_random_streams_start_from_the_key_and_tables_are_constants():
    with jax.numpy_rank_promotion("allow"):
        model, ones = Functional(Random), jnp.ones((64, 8))
        variables = model.init(jax.random.key(0))
        train = functools.partial(model.apply, variables, ones, train=True)
        keys = [{"dropout": jax.random.key(seed)} for seed in (1, 1, 2)]
        one, again, other = (train(rngs=rngs) for rngs in keys)
        chex.assert_trees_all_equal(one, again)
        assert jnp.any(one != other)
        assert jnp.any(one[0] != one[1])  # Each layer drops different values.
        table = model.apply(variables, ones, train=False)[0, 0] - 1
        chex.assert_trees_all_close(table, Random(nnx.Rngs(0)).table[...], atol=1e-6)
        with pytest.raises(ValueError, match=r'draws random numbers.*rngs=\{"dropout": key\}'):
            train()


class Counter(nnx.Module):
    def __init__(self, rngs, kind=nnx.Cache):
        self.seen = kind(jnp.zeros(()))

    def __call__(self, x):
        self.seen[...] += 1
        return x


class Remat(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return nnx.remat(lambda layer, x: layer(x))(self.layer, x)


def test_transforms_of_nnx_may_replace_traced_parameters():
    model = Functional(Remat)
    variables = model.init(jax.random.key(0))
    with jax.numpy_rank_promotion("allow"):
        loss = lambda v: jnp.sum(model.apply(v, X[..., :3], train=True))  # noqa: E731
        gradients = jax.jit(jax.grad(loss))(variables)
    assert float(optax.tree.norm(gradients)) > 0


VARIABLES = TINY.init(jax.random.key(0))
BAD = {
    "no mutable": (
        lambda: TINY.apply(VARIABLES, X[..., :3], train=True),
        r'immutable.*mutable=\["batch_stats"\]',
    ),
    "other state": (
        lambda: Functional(Counter).apply({"params": {}}, X, train=False),
        r"nnx.BatchStat only.*changed seen",
    ),
    "a parameter": (
        lambda: Functional(functools.partial(Counter, kind=nnx.Param)).apply(
            {"params": {"seen": jnp.zeros(())}}, X, train=False
        ),
        r"nnx.BatchStat only.*changed seen",
    ),
    "missing variables": (
        lambda: load_variables(Tiny(nnx.Rngs(0)), {"params": {"conv": {}}}),
        r"of params that differ, such as conv",
    ),
    "another collection": (
        lambda: load_variables(Tiny(nnx.Rngs(0)), {"cache": {}}),
        r"among \['params', 'batch_stats'\], received 'cache'",
    ),
}


@pytest.mark.parametrize(("run", "message"), BAD.values(), ids=BAD)
def test_raises(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_loading_and_reading_are_inverses():
    model = Tiny(nnx.Rngs(1))
    assert relative_difference(to_variables(model), VARIABLES) > 0
    load_variables(model, VARIABLES)
    chex.assert_trees_all_equal(to_variables(model), VARIABLES)
    kept = to_variables(model)["batch_stats"]
    load_variables(model, {"params": jax.tree.map(jnp.zeros_like, VARIABLES["params"])})
    chex.assert_trees_all_equal(to_variables(model)["batch_stats"], kept)
    assert jnp.all(model.conv.kernel[...] == 0)
