import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wsbcn_flax.tasks import Classification
from wsbcn_flax.training import NonFiniteLossError, TrainState, evaluate, make_eval_step


class FixedLogits(nn.Module):
    """A network that returns its one parameter as logits, whatever the image."""

    @nn.compact
    def __call__(self, images, *, train):
        logits = self.param("logits", nn.initializers.zeros, (3,))
        return jnp.broadcast_to(logits[None], (len(images), 3))


def test_loss_is_smoothed_cross_entropy():
    task = Classification(model=FixedLogits(), label_smoothing=0.3)
    logits = np.array([1.0, -2.0, 0.5])
    batch = {"image": jnp.zeros((4, 1, 1, 1)), "label": jnp.array([0, 0, 1, 2])}
    params = {"logits": jnp.asarray(logits, jnp.float32)}
    loss, (_, metrics) = task.loss(params, {}, batch, rng=jax.random.key(0))
    log_p = logits - np.log(np.exp(logits).sum())
    expected = -np.mean([0.7 * log_p[label] + 0.3 * log_p.mean() for label in (0, 0, 1, 2)])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert float(metrics["error"]) == 0.5


def test_refuses_label_smoothing_of_one():
    with pytest.raises(ValueError, match="label_smoothing"):
        Classification(model=FixedLogits(), label_smoothing=1.0)


class GivenLogits(nn.Module):
    """A network that returns the image itself as logits."""

    @nn.compact
    def __call__(self, images, *, train):
        return images.reshape(len(images), -1)


def test_counts_the_labels_that_are_not_among_the_five_largest_logits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(64, 9)).astype(np.float32), rng.integers(0, 9, 64)
    batch = {"image": logits[:, None, None], "label": labels, "mask": np.arange(64) % 3 > 0}
    sums = Classification(model=GivenLogits()).evaluate({}, {}, batch)
    ranks = (np.argsort(-logits, axis=-1) == labels[:, None]).argmax(-1)[batch["mask"]]
    assert float(sums["error"].total) == (ranks > 0).sum()
    assert float(sums["top5_error"].total) == (ranks > 4).sum() > 0
    assert float(sums["top5_error"].weight) == batch["mask"].sum()


def test_five_classes_have_no_top5_error():
    batch = {"image": np.zeros((2, 1, 1, 5)), "label": np.array([0, 4]), "mask": np.ones(2)}
    sums = Classification(model=GivenLogits()).evaluate({}, {}, batch)
    assert set(sums) == {"loss", "error"}
    # Of equal logits the first is the guess, so a constant network is not always right.
    assert float(sums["error"].total) == 1


# --- labels -------------------------------------------------------------------------------------


def given(logits, label, mask=None):
    """Makes a batch with logits as images, for `GivenLogits`."""
    logits, label = jnp.asarray(logits), jnp.asarray(label)
    mask = jnp.ones(len(label)) if mask is None else jnp.asarray(mask)
    return {"image": logits[:, None, None], "label": label, "mask": mask}


def loss_and_gradient(batch, smoothing=0.0):
    task = Classification(model=GivenLogits(), label_smoothing=smoothing)

    def loss_fn(image):
        loss, (_, metrics) = task.loss({}, {}, {**batch, "image": image}, rng=jax.random.key(0))
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
    sums = Classification(model=GivenLogits()).evaluate({}, {}, batch)
    np.testing.assert_allclose(sums["loss"].total, loss, rtol=1e-6)


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
    chex.assert_trees_all_equal(task.evaluate({}, {}, one_hot), task.evaluate({}, {}, numbers))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_mix_the_losses_of_their_labels(smoothing):
    """This is mixup; cross-entropy is linear in the targets."""
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
    """A logit of minus infinity is a probability of zero, which costs nothing for other classes."""
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
        lambda: Classification(model=GivenLogits()).evaluate({}, {}, batch),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{rule}{received}. ")):
            run()


def test_a_batch_needs_its_arrays():
    task, batch = Classification(model=GivenLogits()), given(LOGITS, LABELS)
    image = {"image": batch["image"]}
    with pytest.raises(ValueError, match="batches of image, label, received one of image"):
        task.loss({}, {}, image, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="batches of image, received one of nothing"):
        task.init(jax.random.key(0), {})
    with pytest.raises(ValueError, match=r"label, mask, 1 for .* padding, received one of image, "):
        task.evaluate({}, {}, image | {"label": batch["label"]})
    with pytest.raises(ValueError, match=r"mask .* shape \(4,\), received \(4, 1\)"):
        task.evaluate({}, {}, batch | {"mask": jnp.ones((4, 1))})


def test_a_model_must_return_logits():
    task = Classification(model=nn.Sequential([lambda x, train: x]))
    batch = given(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"return logits \[B, K\], received \(4, 1, 1, 7\)"):
        task.evaluate({}, {}, batch)
