"""A step's statistics do not depend on how calls, micro-batches and devices split activations."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze, unfreeze
from oracles import relative_difference

from wsbcn_flax import BatchChannelNorm, WeightStandardization
from wsbcn_flax.training import MicroBatches, Partition, TrainState, make_train_step

TOLERANCE = 5e-6
NAMES = ("mean", "var", "count")
SGD = optax.sgd(0.1, momentum=0.9)
Norm = functools.partial(BatchChannelNorm, num_groups=4, order="normalize_first")


class Shared(nn.Module):
    """One normalization, called after each of two convolutions, perhaps masked."""

    norm: object = Norm

    @nn.compact
    def __call__(self, x, mask=None):
        norm = self.norm(use_running_average=False, name="norm")
        for name in ("conv1", "conv2"):
            x = nn.relu(norm(nn.Conv(8, (3, 3), use_bias=False, name=name)(x), mask=mask))
            x = x if mask is None else jnp.where(mask, x, 0)
        return x.mean((1, 2))


class Scanned(nn.Module):
    """One convolution and normalization, applied twice by nn.scan."""

    @nn.compact
    def __call__(self, x, mask=None):
        def body(layer, x):
            y = nn.Conv(x.shape[-1], (3, 3), use_bias=False, name="conv")(x)
            return nn.relu(Norm(use_running_average=False, name="norm")(y, mask=mask)), None

        if self.is_initializing():  # nn.scan carries only variables that exist.
            return body(self, x)[0].mean((1, 2))
        scan = nn.scan(
            body,
            variable_broadcast="params",
            variable_carry="batch_stats",
            split_rngs={"params": False},
            length=2,
        )
        return scan(self, x)[0].mean((1, 2))


def rematerialized(**options):
    return nn.remat(BatchChannelNorm)(**Norm.keywords, **options)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 2.0, (16, 8, 8, 8)).astype(np.float32)
    # Masks keep from no column to all columns; whole micro-batches and devices are masked.
    columns = np.array([0, 0, 1, 8, 0, 0, 5, 3, 0, 2, 7, 4, 0, 6, 8, 8])
    mask = np.arange(8)[None, None, :, None] < columns[:, None, None, None]
    return {"x": x, "mask": mask, "y": rng.normal(size=(16, 8)).astype(np.float32)}


def make_loss_fn(model, *, masked):
    def loss_fn(params, batch_stats, batch, *, rng):
        variables = {"params": params, "batch_stats": batch_stats}
        mask = batch["mask"] if masked else None
        out, updates = model.apply(variables, batch["x"], mask, mutable=["batch_stats"])
        return jnp.mean((out - batch["y"]) ** 2), (updates["batch_stats"], {})

    return loss_fn


@functools.cache
def make_step(model, *, masked, mode="jit", devices=1, **micro):
    """Returns the partition and its compiled step, shared by all tests of the same split."""
    partition = Partition(mode=mode, devices=jax.devices()[:devices])
    step = make_train_step(
        make_loss_fn(model, masked=masked),
        SGD,
        transform=WeightStandardization(),
        micro_batches=MicroBatches(**micro),
        axis_name=partition.axis_name,
    )
    return partition, partition.compile(step)


def one_step(model, batch, *, state=None, **options):
    partition, step = make_step(model, **options)
    if state is None:
        variables = jax.jit(model.init)(jax.random.key(0), batch["x"][:1])
        state = TrainState.create(variables, SGD)
    return jax.device_get(step(partition.place_state(state), partition.place_batch(batch)))


SCAN = {"count": 4, "loop": "scan"}
DEVICES = {"mode": "shard_map", "devices": 8, "count": 2, "loop": "scan"}
SPLITS = [
    SCAN,
    DEVICES,
    {"count": 2, "loop": "unroll"},
    {"mode": "pmap", "devices": 4, "count": 4, "loop": "vmap"},
    {"mode": "jit", "devices": 8},
]
CASES = [("masked", Shared(), split) for split in SPLITS] + [
    ("shared", Shared(), SCAN),
    ("masked_remat", Shared(rematerialized), DEVICES),
    ("scanned", Scanned(), DEVICES),
]
_references = {}


@pytest.mark.parametrize(
    ("name", "model", "split"),
    CASES,
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else str(v)[:12],
)
def test_every_split_gives_the_same_step(name, model, split, batch):
    masked = name.startswith("masked")
    if name not in _references:
        # Compares the second step, since estimates, momentum and parameters have then moved.
        state, _ = one_step(model, batch, masked=masked)
        _references[name] = state, one_step(model, batch, masked=masked, state=state)
    state, expected = _references[name]
    actual = one_step(model, batch, masked=masked, state=state, **split)
    assert relative_difference(expected, actual) < TOLERANCE


def test_what_flax_does_depends_on_the_split(batch):
    """A negative control of the tolerance above: each call uses the previous call's update."""
    sequential = functools.partial(BatchChannelNorm, num_groups=4, order="update_first")
    whole, _ = one_step(Shared(sequential), batch, masked=False)
    split, _ = one_step(Shared(sequential), batch, masked=False, count=16, loop="vmap")
    assert relative_difference(whole, split) > 1e-3


def apply_twice(first, second, **options):
    """Calls a layer twice in one apply, outside of any training step."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, first, second):
            norm = Norm(use_running_average=False, name="norm", **options)
            return norm(first), norm(second)

    model = Twice()
    variables = jax.jit(model.init)(jax.random.key(0), first, second)
    stats = {"norm": {"mean": jnp.arange(8.0), "var": jnp.full(8, 3.0), "count": jnp.float32(5)}}
    variables = {**variables, "batch_stats": stats}
    apply = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))
    outputs, updates = apply(variables, first, second)
    return outputs, updates["batch_stats"]["norm"]


def test_two_calls_in_one_apply_are_one_call_on_both(batch):
    """Both calls use the same statistics, and the update is that of both together."""
    first, second = batch["x"][:8], batch["x"][8:] + 1
    (y1, y2), twice = apply_twice(first, second)
    norm = Norm(use_running_average=False)
    x = jnp.concatenate([first, second])
    variables = jax.jit(norm.init)(jax.random.key(0), x)
    stats = {"mean": jnp.arange(8.0), "var": jnp.full(8, 3.0), "count": jnp.float32(5)}
    variables = {**variables, "batch_stats": stats}
    y, updates = jax.jit(functools.partial(norm.apply, mutable=["batch_stats"]))(variables, x)
    chex.assert_trees_all_close(jnp.concatenate([y1, y2]), y, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(twice, updates["batch_stats"], rtol=1e-6)
    assert float(twice["count"]) == 6


def test_applies_do_not_know_of_each_other(batch):
    """The next apply begins with the statistics it receives."""
    norm = Norm(use_running_average=False)
    variables = jax.jit(norm.init)(jax.random.key(0), batch["x"])
    for count in (1, 2, 3):
        _, updates = norm.apply(variables, batch["x"], mutable=["batch_stats"])
        variables = {**variables, **updates}
        assert float(updates["batch_stats"]["count"]) == count
    bound = norm.bind(variables, mutable=["batch_stats"])
    bound(batch["x"])
    assert float(bound.variables["batch_stats"]["count"]) == 4


def test_stacked_layers_have_sums_of_their_own(batch):
    """An ensemble by nn.vmap: every statistic has a leading axis."""

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            stacked = nn.vmap(
                BatchChannelNorm,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                in_axes=1,
                out_axes=1,
            )
            return stacked(**Norm.keywords, use_running_average=False, name="norm")(x)

    x = batch["x"].reshape(8, 2, 8, 8, 8)
    model = Ensemble()
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def loss_fn(params, batch_stats, batch, *, rng):
        variables = {"params": params, "batch_stats": batch_stats}
        y, updates = model.apply(variables, batch["x"], mutable=["batch_stats"])
        return jnp.mean(y**2), (updates["batch_stats"], {})

    step = jax.jit(make_train_step(loss_fn, SGD, micro_batches=MicroBatches(count=2)))
    state, _ = step(TrainState.create(variables, SGD), {"x": x})
    _, updates = model.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_close(state.batch_stats, updates["batch_stats"], rtol=1e-5, atol=1e-6)
    assert state.batch_stats["norm"]["count"].shape == (2,)


def test_the_count_may_be_an_integer(batch):
    """As PyTorch's num_batches_tracked is. A mask's share of a call is a fraction."""
    norm = Norm(use_running_average=False)
    variables = norm.init(jax.random.key(0), batch["x"])
    mask = jnp.ones((*batch["x"].shape[:-1], 1)).at[:, 0].set(0)

    def loss_fn(params, batch_stats, batch, *, rng):
        variables = {"params": params, "batch_stats": batch_stats}
        y, updates = norm.apply(variables, batch["x"], mask=batch["mask"], mutable=["batch_stats"])
        return jnp.mean(y**2), (updates["batch_stats"], {})

    step, stats = jax.jit(make_train_step(loss_fn, SGD)), []
    for dtype in (jnp.float32, jnp.int32):
        given = {**variables["batch_stats"], "count": jnp.zeros((), dtype)}
        state = TrainState.create({**variables, "batch_stats": given}, SGD)
        stats.append(step(state, {"x": batch["x"], "mask": mask})[0].batch_stats)
        assert stats[-1]["count"].dtype == dtype
    chex.assert_trees_all_equal(*(jax.tree.map(jnp.float32, each) for each in stats))
    assert float(stats[0]["count"]) == 1


def test_frozen_variables_train(batch):
    """FrozenDict in, FrozenDict out, with the same numbers."""
    model = Shared()
    variables = jax.jit(model.init)(jax.random.key(0), batch["x"][:1])
    results = [
        one_step(model, batch, masked=True, state=TrainState.create(kind(variables), SGD))[0]
        for kind in (unfreeze, freeze)
    ]
    assert type(results[1].params) is type(results[1].batch_stats) is type(freeze({}))
    chex.assert_trees_all_equal(*(jax.tree.leaves(result) for result in results))


def test_statistics_that_are_not_bcns_pass_through(batch):
    """nn.BatchNorm beside a BatchChannelNorm, and a loss that leaves statistics alone."""

    class Centered(nn.Module):
        """A user's own layer, with statistics of the same names."""

        @nn.compact
        def __call__(self, x):
            stats = {n: self.variable("batch_stats", n, jnp.zeros, ()) for n in NAMES}
            for name, variable in stats.items():
                variable.value = variable.value + len(name) * x.mean()
            return x - stats["mean"].value

    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None):
            x = Centered(name="centered")(x)
            x = nn.BatchNorm(use_running_average=False, name="bn")(x)
            return Norm(use_running_average=False, name="bcn")(x).mean((1, 2))

    model = Mixed()
    variables = jax.jit(model.init)(jax.random.key(0), batch["x"][:1])
    state = TrainState.create(variables, SGD)
    step = make_train_step(make_loss_fn(model, masked=False), SGD)
    after, _ = jax.jit(step)(state, batch)
    _, updates = model.apply(variables, batch["x"], mutable=["batch_stats"])
    assert updates["batch_stats"]["centered"]["count"] != 0
    chex.assert_trees_all_close(after.batch_stats, updates["batch_stats"], rtol=1e-6, atol=1e-6)

    def indifferent(params, batch_stats, batch, *, rng):
        return jnp.sum(params["bcn"]["batch_scale"]), (batch_stats, {})

    after, _ = jax.jit(make_train_step(indifferent, SGD))(state, batch)
    chex.assert_trees_all_equal(after.batch_stats, variables["batch_stats"])
