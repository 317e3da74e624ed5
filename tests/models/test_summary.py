"""The costs of a model equal counts by hand and published ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from wsbcn_flax import BatchChannelNorm, WSConv
from wsbcn_flax.models import (
    WRN28_10,
    Bottleneck,
    CifarResNet,
    ResNet18,
    ResNet50,
    ResNeXt50_32x4d,
    summarize,
)

Small = functools.partial(CifarResNet, depth=8, width=8)


class Linear(nn.Module):
    """Two convolutions with nothing between; training keeps the input of each."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(5, (3, 3), strides=2, use_bias=False)(images)
        x = nn.Conv(10, (3, 3), feature_group_count=5)(x)
        return nn.Dense(7)(jnp.mean(x, axis=(1, 2)))


def test_counts_by_hand():
    """8x6 images give 4x3 positions; kernels are 3x3x3x5 and, in five groups, 3x3x1x10."""
    summary = summarize(Linear(), (8, 6, 3))
    assert summary.parameters == 135 + 90 + 10 + 77
    assert summary.flops == 2 * (4 * 3 * (135 + 90) + 70)
    assert summary.activation_bytes == 4 * (8 * 6 * 3 + 4 * 3 * 5 + 10)


class Scanned(nn.Module):
    """Three dense layers of one size in a loop."""

    @nn.compact
    def __call__(self, images, *, train):
        layer = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layer(nn.Dense(4), images.reshape(len(images), -1), None)
        return x


def test_counts_each_turn_of_a_loop():
    summary = summarize(Scanned(), (2, 2, 1))
    assert summary.parameters == 3 * (4 * 4 + 4)
    assert summary.flops == 2 * 3 * 4 * 4


@pytest.mark.parametrize(
    ("network", "billions"),
    [(ResNet18, 1.814), (ResNet50, 4.089), (ResNeXt50_32x4d, 4.230)],
)
def test_multiply_adds_are_the_published_ones(network, billions):
    """They also equal each kernel's size times the positions of its convolution's output."""
    model = network()
    images = jnp.ones((1, 224, 224, 3))
    init = functools.partial(model.init_with_output, train=False, capture_intermediates=True)
    _, variables = jax.eval_shape(init, jax.random.key(0), images)
    outputs = traverse_util.flatten_dict(variables["intermediates"])
    by_hand = 0
    for path, kernel in traverse_util.flatten_dict(variables["params"]).items():
        if path[-1] == "kernel":
            _, *positions, _ = outputs[*path[:-1], "__call__"][0].shape
            by_hand += kernel.size * functools.reduce(int.__mul__, positions, 1)
    summary = summarize(model, (224, 224, 3))
    assert summary.flops == 2 * by_hand
    assert round(by_hand / 1e9, 3) == billions


@pytest.mark.parametrize(
    "norm",
    [
        functools.partial(nn.GroupNorm, num_groups=4),
        functools.partial(BatchChannelNorm, num_groups=4),
    ],
    ids=["gn", "bcn"],
)
def test_weight_standardization_costs_nothing_for_each_image(norm):
    """Kernels are standardized once for all images, without operations or memory per image."""
    plain, standardized = (Small(norm=norm, conv=conv) for conv in (nn.Conv, WSConv))
    assert summarize(standardized, (32, 32, 3)) == summarize(plain, (32, 32, 3))


def test_what_lowers_the_memory_of_activations():
    small = Small(norm=nn.LayerNorm, block=functools.partial(Bottleneck, base_width=256), depth=11)
    cost = lambda model: summarize(model, (32, 32, 3))  # noqa: E731
    plain, remat = cost(small), cost(small.clone(block=nn.remat(small.block)))
    half, wider_head = cost(small.clone(dtype=jnp.bfloat16)), cost(small.clone(num_classes=1000))
    assert remat._replace(activation_bytes=0) == plain._replace(activation_bytes=0)
    assert remat.activation_bytes < 0.5 * plain.activation_bytes
    # Memory does not halve, since normalizations keep float32.
    assert half.activation_bytes < 0.9 * plain.activation_bytes
    assert wider_head.activation_bytes == plain.activation_bytes
    assert wider_head.parameters == plain.parameters + 33 * 990


def test_dropout_is_kept_too():
    never = summarize(WRN28_10(depth=8, features=16, dropout_rate=0.0), (8, 8, 3))
    often = summarize(WRN28_10(depth=8, features=16), (8, 8, 3))
    assert often.flops == never.flops
    assert often.activation_bytes > never.activation_bytes
