"""Evaluation counts every sample once on any devices, and passes outputs to evaluators."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wsbcn_flax import BatchChannelNorm, WeightStandardization
from wsbcn_flax.tasks import Classification, Mean
from wsbcn_flax.training import (
    Average,
    NonFiniteLossError,
    Partition,
    TrainState,
    evaluate,
    make_eval_step,
)


class Net(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(4, (3, 3), use_bias=False)(images)
        x = nn.relu(BatchChannelNorm(2)(x, use_running_average=not train))
        return nn.Dense(10)(x.mean((1, 2)))


MODEL = Net()


def make_batch(size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "mask": np.ones(size, np.float32),
    }


def pad(batch, size):
    """Pads with NaN images and a label that is not a class, which would show in the metrics."""
    extra = size - len(batch["label"])
    return {
        "image": np.concatenate([batch["image"], np.full((extra, 8, 8, 1), np.nan, np.float32)]),
        "label": np.concatenate([batch["label"], np.full(extra, 10**6, np.int32)]),
        "mask": np.concatenate([batch["mask"], np.zeros(extra, np.float32)]),
    }


def test_evaluation_counts_every_sample_once_and_padding_never():
    task = Classification(model=MODEL)
    whole = make_batch(13)
    state = TrainState.create(jax.jit(task.init)(jax.random.key(0), whole), optax.sgd(0.1))
    step = jax.jit(make_eval_step(task))
    parts = [{name: array[i : i + 5] for name, array in whole.items()} for i in (0, 5, 10)]
    batches = [pad(part, 5) for part in parts]
    chex.assert_trees_all_close(
        evaluate(step, state, batches), evaluate(step, state, [whole]), rtol=1e-5
    )
    logits = MODEL.apply(
        {"params": state.params, "batch_stats": state.batch_stats}, whole["image"], train=False
    )
    wrong = np.mean(np.argmax(logits, -1) != whole["label"])
    np.testing.assert_allclose(evaluate(step, state, batches)["error"], wrong, rtol=1e-6)


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_evaluation_on_eight_devices(mode):
    task = Classification(model=MODEL)
    batch = pad(make_batch(13), 16)
    state = TrainState.create(jax.jit(task.init)(jax.random.key(0), batch), optax.sgd(0.1))
    alone = evaluate(jax.jit(make_eval_step(task)), state, [batch])
    partition = Partition(mode=mode)
    step = partition.compile(
        make_eval_step(task, axis_name=partition.axis_name), donate_state=False
    )
    spread = evaluate(step, partition.place_state(state), [partition.place_batch(batch)])
    chex.assert_trees_all_close(spread, alone, rtol=1e-5)


def test_evaluation_standardizes_the_kernels_before_the_first_batch():
    task = Classification(model=MODEL)
    batch = make_batch(4)
    state = TrainState.create(jax.jit(task.init)(jax.random.key(0), batch), optax.sgd(0.1))
    ws = WeightStandardization()
    step = jax.jit(make_eval_step(task))
    folded = state.replace(params=ws(state.params))
    expected = evaluate(step, folded, [batch])
    assert expected != evaluate(step, state, [batch])
    chex.assert_trees_all_close(evaluate(step, state, [batch], transform=ws), expected, rtol=1e-5)


class Predicts:
    """A task whose evaluation returns predictions and a mean."""

    def evaluate(self, params, batch_stats, batch):
        return {"twice": 2 * batch["x"], "mean": Mean.of(batch["x"], weight=batch["mask"])}


class Collect:
    """An evaluator of predictions."""

    def __init__(self):
        self.rows = []

    def add(self, outputs):
        self.rows.extend(outputs["twice"].tolist())

    def result(self):
        return {"last": self.rows[-1], "rows": len(self.rows)}


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_predictions_come_in_the_order_of_the_batch(mode):
    partition = Partition(mode=mode)
    step = partition.compile(
        make_eval_step(Predicts(), axis_name=partition.axis_name), donate_state=False
    )
    seen = []

    class Remember(Collect):
        def result(self):
            seen.extend(self.rows)
            return super().result()

    state = partition.place_state(TrainState(jnp.int32(0), {}, {}, ()))
    x = np.arange(32, dtype=np.float32)
    batches = [{"x": x[:16], "mask": np.ones(16)}, {"x": x[16:], "mask": np.arange(16) < 8.0}]
    batches = map(partition.place_batch, batches)
    metrics = evaluate(step, state, batches, evaluators=(Average, Remember))
    assert seen == (2 * x).tolist()
    assert metrics == {"mean": x[:24].mean(), "last": 62, "rows": 32}


def test_evaluation_needs_a_sample():
    with pytest.raises(ValueError, match="at least one valid sample"):
        evaluate(lambda state, batch: {"loss": Mean(0.0, 0.0)}, None, [{}])
    with pytest.raises(ValueError, match="at least one valid sample"):
        evaluate(lambda state, batch: {}, None, [])


def test_averages_are_scalars():
    with pytest.raises(ValueError, match=r"must be scalars.*\{'loss': \(4,\)\}"):
        evaluate(lambda state, batch: {"loss": Mean(jnp.ones(4), 4.0)}, None, [{}])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_evaluation_is_finite_or_an_error(value):
    def step(state, batch):
        return {"loss": Mean(value, 2.0), "error": Mean(1.0, 2.0)}

    with pytest.raises(NonFiniteLossError, match=r"received \{'loss': (nan|inf)\}\. .*labels"):
        evaluate(step, None, [{}, {}])
