import functools
import re

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
    NonFiniteLossError,
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
    """Padding that would be seen: NaN images and a label that is no class."""
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


def test_evaluation_needs_a_sample():
    with pytest.raises(ValueError, match="at least one valid sample"):
        evaluate(lambda state, batch: {"count": 0.0}, None, [{}])


def test_evaluation_needs_a_count():
    with pytest.raises(ValueError, match=r"as count, received sums of loss alone"):
        evaluate(lambda state, batch: {"loss": 1.0}, None, [{}])


def test_evaluation_needs_sums():
    with pytest.raises(ValueError, match=r"must be scalars.*\{'loss': \(4,\)\}"):
        evaluate(lambda state, batch: {"loss": jnp.ones(4), "count": 4}, None, [{}])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_evaluation_is_finite_or_an_error(value):
    with pytest.raises(NonFiniteLossError, match=r"received \{'loss': (nan|inf)\}\. .*labels"):
        evaluate(lambda state, batch: {"loss": value, "error": 1.0, "count": 2.0}, None, [{}, {}])


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


# --- labels -------------------------------------------------------------------------------------


def given(logits, label, mask=None):
    """A batch of logits as images, for `GivenLogits`."""
    logits, label = jnp.asarray(logits), jnp.asarray(label)
    mask = jnp.ones(len(label)) if mask is None else jnp.asarray(mask)
    return {"image": logits[:, None, None], "label": label, "mask": mask}


def loss_and_gradient(batch, smoothing=0.0):
    task = Classification(model=GivenLogits(), label_smoothing=smoothing)

    def loss_fn(image):
        loss, (_, metrics) = task.loss_fn({}, {}, {**batch, "image": image}, rng=jax.random.key(0))
        return loss, metrics

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(batch["image"])


LOGITS = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
LABELS = np.array([0, 6, 2, 5])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32])
def test_the_loss_is_that_of_optax(smoothing, dtype):
    batch = given(LOGITS, LABELS.astype(dtype))
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 7), smoothing)
    expected = jnp.mean(optax.softmax_cross_entropy(LOGITS, targets))
    np.testing.assert_allclose(loss_and_gradient(batch, smoothing)[0][0], expected, rtol=1e-6)
    loss = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS).sum()
    sums = Classification(model=GivenLogits()).eval_fn({}, {}, batch)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-6)


def test_small_dtypes_hold_labels_of_many_classes():
    logits = jax.random.normal(jax.random.key(0), (3, 1000))
    small, wide = (given(logits, np.array([0, 255, 7], d)) for d in (np.uint8, np.int32))
    chex.assert_trees_all_equal(loss_and_gradient(small), loss_and_gradient(wide))
    assert np.isfinite(loss_and_gradient(small)[0][0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bad", [-1, -7, 7, 255, 2**31 - 1, -(2**31)])
def test_a_label_outside_the_classes_is_nan(smoothing, bad):
    batch = given(LOGITS, np.array([0, bad, 2, 5], np.int32))
    (loss, _), gradient = loss_and_gradient(batch, smoothing)
    assert np.isnan(loss)
    assert np.isnan(gradient[1]).all()
    state = TrainState(jnp.int32(0), {}, {}, ())
    step = jax.jit(make_eval_step(Classification(model=GivenLogits())))
    with pytest.raises(NonFiniteLossError, match=r"\{'loss': nan\}.*labels outside the classes"):
        evaluate(step, state, [batch])
    padding = given(LOGITS, batch["label"], mask=[1, 0, 1, 1])
    assert np.isfinite(evaluate(step, state, [padding])["loss"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.float32, jnp.bfloat16])
def test_one_hot_targets_are_their_labels(smoothing, dtype):
    numbers, one_hot = given(LOGITS, LABELS), given(LOGITS, np.eye(7)[LABELS].astype(dtype))
    chex.assert_trees_all_close(
        loss_and_gradient(one_hot, smoothing), loss_and_gradient(numbers, smoothing), rtol=1e-6
    )
    task = Classification(model=GivenLogits())
    chex.assert_trees_all_equal(task.eval_fn({}, {}, one_hot), task.eval_fn({}, {}, numbers))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_mix_the_losses_of_their_labels(smoothing):
    """Mixup; cross-entropy is linear in the targets."""
    one, other = LABELS, np.roll(LABELS, 1)
    targets = 0.7 * np.eye(7, dtype=np.float32)[one] + 0.3 * np.eye(7, dtype=np.float32)[other]
    (loss, metrics), gradient = loss_and_gradient(given(LOGITS, targets), smoothing)
    (loss1, metrics1), gradient1 = loss_and_gradient(given(LOGITS, one), smoothing)
    (loss2, _), gradient2 = loss_and_gradient(given(LOGITS, other), smoothing)
    np.testing.assert_allclose(loss, 0.7 * loss1 + 0.3 * loss2, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.7 * gradient1 + 0.3 * gradient2, rtol=1e-5, atol=1e-7)
    assert metrics == metrics1  # The argmax of the targets counts.


@pytest.mark.parametrize("row", [np.zeros(7), np.full(7, 2 / 7), [-0.5, 1.5, 0, 0, 0, 0, 0]])
def test_a_target_that_is_no_distribution_is_nan(row):
    """A row of zeros is what one_hot makes of a label outside the classes."""
    targets = np.eye(7, dtype=np.float32)[LABELS]
    targets[1] = row
    (loss, _), gradient = loss_and_gradient(given(LOGITS, targets))
    assert np.isnan(loss)
    assert np.isnan(gradient[1]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_have_a_float32_loss(dtype):
    logits = LOGITS.astype(dtype)
    (loss, _), gradient = loss_and_gradient(given(logits, LABELS), 0.1)
    (expected, _), _ = loss_and_gradient(given(logits.astype(np.float32), LABELS), 0.1)
    assert (loss.dtype, gradient.dtype) == (jnp.float32, dtype)
    np.testing.assert_array_equal(loss, expected)


def test_classes_may_be_ruled_out():
    """A logit of minus infinity is a probability of zero; of another class it costs nothing."""
    logits = np.where(np.arange(7) == 3, -np.inf, LOGITS)
    for label in (LABELS, np.eye(7)[LABELS]):
        (loss, _), gradient = loss_and_gradient(given(logits, label))
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "label",
    [
        LABELS[:, None],
        LABELS.astype(np.float32),
        LABELS[:3],
        np.ones((4, 8), np.float32),
        np.ones((4, 7), np.complex64),
        np.ones(4, bool),
    ],
    ids=["column", "float", "length", "classes", "complex", "bool"],
)
def test_other_labels_are_refused(label):
    batch = given(LOGITS, np.zeros(4, int)) | {"label": jnp.asarray(label)}
    received = f"{batch['label'].dtype} {batch['label'].shape}"
    rule = "label must be class numbers, integers (4,), or target distributions (4, 7), received "
    for run in (
        lambda: loss_and_gradient(batch),
        lambda: Classification(model=GivenLogits()).eval_fn({}, {}, batch),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{rule}{received}. ")):
            run()


def test_a_batch_needs_its_arrays():
    task, batch = Classification(model=GivenLogits()), given(LOGITS, LABELS)
    image = {"image": batch["image"]}
    with pytest.raises(ValueError, match="batches of image, label, received one of image"):
        task.loss_fn({}, {}, image, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="batches of image, received one of nothing"):
        task.init(jax.random.key(0), {})
    with pytest.raises(ValueError, match=r"label, mask, 1 for .* padding, received one of image, "):
        task.eval_fn({}, {}, image | {"label": batch["label"]})
    with pytest.raises(ValueError, match=r"mask .* shape \(4,\), received \(4, 1\)"):
        task.eval_fn({}, {}, batch | {"mask": jnp.ones((4, 1))})


def test_a_model_must_return_logits():
    task = Classification(model=nn.Sequential([lambda x, train: x]))
    batch = given(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"return logits \[B, K\], received \(4, 1, 1, 7\)"):
        task.eval_fn({}, {}, batch)
