"""Kernels rounded once a step give the same results; gradients accumulate in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wsbcn_flax import WeightStandardization
from wsbcn_flax.models import BasicBlock, ResNet
from wsbcn_flax.tasks import Classification
from wsbcn_flax.training import MicroBatches, TrainState, make_train_step

SGD = optax.sgd(1.0)


def step_of_sums(kernels, batch, **options):
    """Takes a step with a loss equal to the mean weight times the sum of all kernels."""
    seen = {}

    def loss_fn(params, batch_stats, batch, *, rng):
        seen.update({name: layer["kernel"].dtype for name, layer in params.items()})
        weight = jnp.mean(batch["weight"])
        leaves = jax.tree.leaves(params)
        loss = sum(jnp.sum(weight.astype(k.dtype) * k).astype(jnp.float32) for k in leaves)
        return loss, (batch_stats, {})

    step = jax.jit(make_train_step(loss_fn, SGD, **options))
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    state, _ = step(TrainState.create({"params": params}, SGD), batch)
    return seen, {name: layer["kernel"] for name, layer in state.params.items()}


def test_kernels_alone_are_rounded_and_none_is_widened():
    kernels = {
        "conv": jnp.ones((1, 1, 2, 2)),
        "conv1d": jnp.ones((1, 2, 2)),
        "narrow": jnp.ones((1, 2, 2), jnp.bfloat16),
        "dense": jnp.ones((2, 2)),
        "scale": jnp.ones(2),
    }
    expected = dict.fromkeys(kernels, jnp.float32) | {"narrow": jnp.bfloat16}
    batch = {"weight": jnp.ones(4)}
    for dtype in (None, jnp.float32, "float32"):
        assert step_of_sums(kernels, batch, kernel_dtype=dtype)[0] == expected
    rounded = dict.fromkeys(("conv", "conv1d", "narrow"), jnp.bfloat16)
    seen, params = step_of_sums(kernels, batch, kernel_dtype=jnp.bfloat16)
    assert seen == expected | rounded
    assert {name: array.dtype for name, array in params.items()} == expected


def test_standardized_kernels_of_dense_layers_are_not_rounded():
    values = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    params = {"conv": {"kernel": values}, "dense": {"kernel": values[0, 0]}}
    seen = {}

    def loss_fn(params, batch_stats, batch, *, rng):
        seen.update({name: layer["kernel"].dtype for name, layer in params.items()})
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(params)), ({}, {})

    ws = WeightStandardization(where=("conv", "dense"))
    step = make_train_step(loss_fn, SGD, transform=ws, kernel_dtype=jnp.bfloat16)
    jax.jit(step)(TrainState.create({"params": params}, SGD), {"x": jnp.ones(2)})
    assert seen == {"conv": jnp.bfloat16, "dense": jnp.float32}


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_losses_and_metrics_add_up_in_float32(loop):
    """In float16 the sum of losses is not finite; booleans would add up to true."""

    def loss_fn(params, batch_stats, batch, *, rng):
        loss = (params["w"] * 100 * batch["x"].mean()).astype(jnp.float16)
        return loss, (batch_stats, {"late": (batch["index"] >= 512).any(), "rate": 0.25})

    micro_batches = MicroBatches(count=1024 if loop == "scan" else 16, loop=loop)
    batch = {"x": jnp.ones(1024), "index": jnp.arange(1024)}
    if loop == "unroll":
        batch = jax.tree.map(lambda x: x[::64], batch)
    step = jax.jit(make_train_step(loss_fn, SGD, micro_batches=micro_batches))
    _, metrics = step(TrainState.create({"params": {"w": jnp.ones(())}}, SGD), batch)
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 100,
        "grad_norm": 100,
        "late": 0.5,
        "rate": 0.25,
    }


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_gradients_accumulate_in_float32(loop):
    """256 + 1 is 256 in bfloat16, but the mean over micro-batches counts all four."""
    kernels = {"conv": jnp.zeros((1, 1, 2, 2))}
    batch = {"weight": jnp.array([256.0, 1.0, 1.0, 1.0])}
    micro_batches = MicroBatches(count=4, loop=loop)
    options = {"kernel_dtype": jnp.bfloat16, "micro_batches": micro_batches}
    _, params = step_of_sums(kernels, batch, **options)
    np.testing.assert_array_equal(params["conv"], np.full((1, 1, 2, 2), -259 / 4))


def test_a_transform_returns_kernels_alone_in_its_dtype():
    params = {"conv": {"kernel": jnp.ones((1, 1, 4, 2)), "bias": jnp.ones(2)}, "b": jnp.ones(1)}
    out = WeightStandardization(where="conv", dtype=jnp.bfloat16)(params)
    dtypes = {array.dtype.name for array in (out["conv"]["bias"], out["b"])}
    assert (out["conv"]["kernel"].dtype, dtypes) == (jnp.bfloat16, {"float32"})


def test_a_network_takes_the_step_that_it_takes_without():
    """In bfloat16 the layers or the step may round kernels, with equal results."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(4, 8, 8, 3)).astype(np.float32),
        "label": np.arange(4, dtype=np.int32),
    }
    model = ResNet(
        stage_sizes=(1,),
        features=8,
        stem_features=8,
        block=BasicBlock,
        num_classes=10,
        dtype=jnp.bfloat16,
    )
    task = Classification(model=model)
    variables = jax.jit(task.init)(jax.random.key(0), batch)

    def updates(kernel_dtype):
        step = make_train_step(
            task, SGD, transform=WeightStandardization(), kernel_dtype=kernel_dtype
        )
        state, _ = jax.jit(step)(TrainState.create(variables, SGD), batch)
        return jax.tree.map(jnp.subtract, state.params, variables["params"])

    for one, other in zip(*map(jax.tree.leaves, map(updates, (None, jnp.bfloat16))), strict=True):
        scale = float(jnp.abs(one).max())
        assert float(jnp.abs(one - other).max()) <= float(jnp.finfo(jnp.bfloat16).eps) * scale
