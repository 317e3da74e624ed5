"""A padded image has the features, statistics and logits of the image alone."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from wsbcn_flax import BatchChannelNorm, ChannelNorm
from wsbcn_flax.models import BasicBlock, Bottleneck, PreActBlock, ResNet
from wsbcn_flax.models._padding import repeat_edges

SIZE, PADDED = (35, 42), (64, 48)
Tiny = functools.partial(ResNet, stage_sizes=(1, 1), features=16, stem_features=8)
GN = functools.partial(nn.GroupNorm, num_groups=4)
BCN = functools.partial(BatchChannelNorm, num_groups=4)


def images():
    """Makes an image, and the same image inside a padding of other values."""
    image = normal(0, 1, *SIZE, 3)
    filled = jnp.full((1, *PADDED, 3), 7.0).at[:, : SIZE[0], : SIZE[1]].set(image)
    return image, filled


def trained(model, image, image_hw=None):
    """Calls the model in training with random parameters; returns outputs and statistics."""
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), image)
    leaves, structure = jax.tree.flatten(shapes["params"])
    params = [0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), dict(shapes))
    variables["params"] = jax.tree.unflatten(structure, params)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    return jax.jit(apply)(variables, image, image_hw=image_hw)


def cut(padded, like):
    """Checks that features of the padding are zero; returns those of the image."""
    height, width = like.shape[1:3]
    part = padded[:, :height, :width]
    assert float(jnp.abs(padded).sum() - jnp.abs(part).sum()) == pytest.approx(0, abs=1e-2)
    return part


@pytest.mark.parametrize(
    ("block", "norm"),
    [
        (BasicBlock, GN),
        (Bottleneck, BCN),
        (BasicBlock, nn.BatchNorm),
        (PreActBlock, functools.partial(ChannelNorm, num_groups=4)),
    ],
    ids=["basic-gn", "bottleneck-bcn", "basic-bn", "preactivation-channel-norm"],
)
def test_padding_does_not_count(block, norm):
    image, padded = images()
    model = Tiny(block=block, norm=norm, num_classes=None)
    features, updates = trained(model, image)
    of_padded, updates_of_padded = trained(model, padded, jnp.array([SIZE]))
    for one, other in zip(features, of_padded, strict=True):
        chex.assert_trees_all_close(cut(other, one), one, rtol=2e-4, atol=2e-4)
    chex.assert_trees_all_close(updates_of_padded, updates, rtol=1e-4, atol=1e-4)


def test_it_counts_unless_its_size_is_told():
    """A negative control of the tolerance above."""
    image, padded = images()
    model = Tiny(block=Bottleneck, norm=GN, num_classes=None)
    (one, _), (other, _) = trained(model, image)[0], trained(model, padded)[0]
    assert float(jnp.abs(other[:, : one.shape[1], : one.shape[2]] - one).max()) > 0.1


def test_logits_are_those_of_the_image():
    image, padded = images()
    model = Tiny(block=BasicBlock, norm=GN, num_classes=5)
    logits, _ = trained(model, image)
    of_padded, _ = trained(model, padded, jnp.array([SIZE]))
    chex.assert_trees_all_close(of_padded, logits, rtol=1e-4, atol=1e-4)


def test_repeats_the_last_row_and_column():
    x = normal(1, 2, 4, 5, 3)
    repeated = repeat_edges(x, jnp.array([[5, 20], [16, 9]]), 4)
    for image, height, width in [(0, 2, 5), (1, 4, 3)]:
        edge = np.pad(x[image, :height, :width], ((0, 1), (0, 1), (0, 0)), mode="edge")[:4, :5]
        chex.assert_trees_all_equal(
            np.asarray(repeated[image, : edge.shape[0], : edge.shape[1]]), edge
        )


@pytest.mark.parametrize(
    ("shape", "image_hw", "message"),
    [
        ((1, 64, 48, 3), jnp.array([35, 42]), r"\[1, 2\], received \(2,\)"),
        ((1, 50, 48, 3), jnp.array([SIZE]), "multiple of the strides"),
    ],
)
def test_refuses(shape, image_hw, message):
    model = Tiny(block=BasicBlock, norm=GN, num_classes=None)
    with pytest.raises(ValueError, match=message):
        trained(model, jnp.ones(shape), image_hw)
