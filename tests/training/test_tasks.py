import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wsbcn_flax import BatchChannelNorm, WeightStandardization
from wsbcn_flax.models import CifarResNet
from wsbcn_flax.training import (
    Classification,
    Partition,
    TrainState,
    evaluate,
    make_eval_step,
)

MODEL = CifarResNet(depth=8, width=4, norm=functools.partial(BatchChannelNorm, num_groups=2))


def make_batch(size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "mask": np.ones(size, np.float32),
    }


def pad(batch, size):
    """Padding that would be seen: NaN images and the label 0."""
    extra = size - len(batch["label"])
    return {
        "image": np.concatenate([batch["image"], np.full((extra, 8, 8, 1), np.nan, np.float32)]),
        "label": np.concatenate([batch["label"], np.zeros(extra, np.int32)]),
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


def test_evaluation_needs_a_sample():
    with pytest.raises(ValueError, match="at least one valid sample"):
        evaluate(lambda state, batch: {"count": 0.0}, None, [{}])


class FixedLogits(nn.Module):
    """Answers with its one parameter, whatever the image."""

    @nn.compact
    def __call__(self, images, *, train):
        logits = self.param("logits", nn.initializers.zeros, (3,))
        return jnp.broadcast_to(logits[None], (len(images), 3))


def test_loss_is_smoothed_cross_entropy():
    task = Classification(model=FixedLogits(), label_smoothing=0.3)
    logits = np.array([1.0, -2.0, 0.5])
    batch = {"image": jnp.zeros((4, 1, 1, 1)), "label": jnp.array([0, 0, 1, 2])}
    params = {"logits": jnp.asarray(logits, jnp.float32)}
    loss, (_, metrics) = task.loss_fn(params, {}, batch, rng=jax.random.key(0))
    log_p = logits - np.log(np.exp(logits).sum())
    expected = -np.mean([0.7 * log_p[label] + 0.3 * log_p.mean() for label in (0, 0, 1, 2)])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert float(metrics["error"]) == 0.5


def test_refuses_label_smoothing_of_one():
    with pytest.raises(ValueError, match="label_smoothing"):
        Classification(model=FixedLogits(), label_smoothing=1.0)


class GivenLogits(nn.Module):
    """Answers with the image itself."""

    @nn.compact
    def __call__(self, images, *, train):
        return images.reshape(len(images), -1)


def test_counts_the_labels_that_are_not_among_the_five_largest_logits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(64, 9)).astype(np.float32), rng.integers(0, 9, 64)
    batch = {"image": logits[:, None, None], "label": labels, "mask": np.arange(64) % 3 > 0}
    sums = Classification(model=GivenLogits()).eval_fn({}, {}, batch)
    ranks = (np.argsort(-logits, axis=-1) == labels[:, None]).argmax(-1)[batch["mask"]]
    assert float(sums["error"]) == (ranks > 0).sum()
    assert float(sums["top5_error"]) == (ranks > 4).sum() > 0


def test_five_classes_have_no_top5_error():
    batch = {"image": np.zeros((2, 1, 1, 5)), "label": np.array([0, 4]), "mask": np.ones(2)}
    sums = Classification(model=GivenLogits()).eval_fn({}, {}, batch)
    assert set(sums) == {"loss", "error", "count"}
    # Of equal logits the first is the guess: a network that says nothing is not right.
    assert float(sums["error"]) == 1
