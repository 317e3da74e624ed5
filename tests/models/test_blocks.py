"""Residual blocks: initialization, input of the shortcut, place of dropout, and remat."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from networks import NORMS, count
from oracles import normal

from wsbcn_flax.models import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck, ResNet
from wsbcn_flax.models._layers import bind_mode, make_conv

X = normal(2, 2, 6, 6, 8)
each_preactivation = pytest.mark.parametrize("block", [PreActBlock, PreActBottleneck])
each_block = pytest.mark.parametrize(
    "block", [BasicBlock, Bottleneck, PreActBlock, PreActBottleneck]
)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("block", [BasicBlock, functools.partial(Bottleneck, base_width=256)])
def test_activation_after_the_sum_starts_as_the_shortcut(block, norm):
    """The last scale of each branch starts at zero, and its gradient is not zero."""
    module = block(8, conv=nn.Conv, norm=bind_mode(NORMS[norm], train=True))
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), X)
    chex.assert_trees_all_equal(y, nn.relu(X))

    @jax.jit
    def gradients(params):
        def loss_fn(params):
            y, _ = module.apply({**variables, "params": params}, X, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss_fn)(params)

    name = "channel_scale" if norm.startswith("bcn") else "scale"
    last_scale = gradients(variables["params"])[f"norm{module.depth}"][name]
    assert jnp.abs(last_scale).min() > 0


@each_preactivation
def test_preactivation_branches_learn_from_the_start(block):
    """No scale starts at zero: with the ReLU after it, its gradient would be zero."""
    module = block(8, conv=nn.Conv, norm=nn.LayerNorm)
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    loss_fn = lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, X)))  # noqa: E731
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss_fn))(params)):
        assert jnp.abs(leaf).max() > 0


@pytest.mark.parametrize("activated", [False, True])
@each_preactivation
def test_the_shortcut_takes_the_input_or_its_activation(block, activated):
    """If the branch is zero, the block is the shortcut's convolution of its input."""
    module = block(16, conv=nn.Conv, norm=nn.LayerNorm, strides=2, activated_shortcut=activated)
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    last = f"conv{module.depth}"
    params[last] = jax.tree.map(jnp.zeros_like, params[last])
    taken = nn.relu(nn.LayerNorm().apply({"params": params["norm1"]}, X)) if activated else X
    expected = taken[:, ::2, ::2] @ params["shortcut_conv"]["kernel"][0, 0]
    actual = jax.jit(module.apply)({"params": params}, X)
    chex.assert_trees_all_close(actual, expected, atol=1e-5)


@each_block
@pytest.mark.parametrize("strides", [1, 2])
def test_the_shortcut_is_the_identity_where_the_shape_stays(block, strides):
    module = block(8, conv=nn.Conv, norm=nn.LayerNorm, strides=strides)
    y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), X)
    assert y.shape == (2, 6 // strides, 6 // strides, 8)
    assert ("shortcut_conv" in variables["params"]) == (strides == 2)
    with_norm = strides == 2 and not module.preactivation
    assert ("shortcut_norm" in variables["params"]) == with_norm


@each_block
def test_dropout_comes_before_the_last_convolution(block):
    """Dropping everything there makes the last convolution's output zero, and no other's."""
    dropout = functools.partial(nn.Dropout, rate=1.0, deterministic=False)
    module = block(8, conv=nn.Conv, norm=nn.LayerNorm, dropout=dropout)
    init = functools.partial(module.init_with_output, capture_intermediates=True)
    _, variables = jax.jit(init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    outputs = variables["intermediates"]
    for index in range(1, module.depth + 1):
        (y,) = outputs[f"conv{index}"]["__call__"]
        assert (jnp.abs(y).max() == 0) == (index == module.depth)


@pytest.mark.parametrize(
    ("options", "inner", "fan_in"),
    [
        ({}, 64, 64),
        ({"groups": 32, "base_width": 4}, 128, 4),
        ({"groups": 8}, 512, 64),
        ({"base_width": 128}, 128, 128),
    ],
    ids=["resnet", "resnext_32x4d", "resnext_8x64d", "wide_resnet"],
)
@pytest.mark.parametrize("block", [Bottleneck, PreActBottleneck])
def test_channels_of_bottlenecks(block, options, inner, fan_in):
    module = block(256, conv=nn.Conv, norm=nn.LayerNorm, **options)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 4, 4, 96)))["params"]
    kernels = [params[f"conv{index}"]["kernel"].shape for index in (1, 2, 3)]
    assert kernels == [(1, 1, 96, inner), (3, 3, fan_in, inner), (1, 1, inner, 256)]


@pytest.mark.parametrize(
    "block",
    [
        nn.remat(functools.partial(Bottleneck, groups=2)),
        functools.partial(nn.remat(Bottleneck), groups=2),
    ],
    ids=["remat_of_partial", "partial_of_remat"],
)
def test_networks_take_blocks_under_remat(block):
    """Parameters and gradients are the same, and blocks are computed again."""
    remat = ResNet(stage_sizes=(1, 1), features=8, stem_features=4, block=block)
    plain = remat.clone(block=functools.partial(Bottleneck, groups=2))
    images = normal(3, 2, 16, 16, 3)
    variables = jax.jit(functools.partial(plain.init, train=False))(jax.random.key(0), images)

    def gradients(model):
        def loss_fn(params):
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(logits)), updates

        grad = jax.grad(loss_fn, has_aux=True)
        blocks = str(jax.make_jaxpr(grad)(variables["params"])).count("prevent_cse")
        return jax.jit(grad)(variables["params"]), blocks

    expected, none = gradients(plain)
    actual, some = gradients(remat)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert none == 0
    assert some > 0
    assert count(actual) == count(expected)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("resolution", [8, 9])
def test_padding_is_pytorchs(size, resolution):
    """A kernel that is one at its centre reads positions 0, 2, 4, ... at any resolution."""
    x = normal(4, 1, resolution, resolution, 2)
    kernel = jnp.zeros((size, size, 2, 2)).at[size // 2, size // 2].set(jnp.eye(2))
    conv = make_conv(nn.Conv, 2, size, strides=2, name="conv")
    chex.assert_trees_all_equal(conv.apply({"params": {"kernel": kernel}}, x), x[:, ::2, ::2])
