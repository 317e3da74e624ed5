"""DenseNet: layers append channels, transitions halve them, and its size is the published one."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from networks import abstract_variables, count
from oracles import normal

from wsbcn_flax.models import DenseNet, DenseNetBC100_12
from wsbcn_flax.models._densenet import _DenseLayer


def closed_form(depth, growth, classes):
    """Counts parameters; a norm before a convolution has two for each input channel."""
    channels, total = 2 * growth, 27 * 2 * growth
    for block in range(3):
        for _ in range((depth - 4) // 6):
            total += channels * (2 + 4 * growth) + 4 * growth * (2 + 9 * growth)
            channels += growth
        if block < 2:
            total += channels * (2 + channels // 2)
            channels //= 2
    return total + 2 * channels + (channels + 1) * classes


@pytest.mark.parametrize("depth", [10, 22, 40])
@pytest.mark.parametrize("growth", [4, 5])
def test_number_of_parameters(depth, growth):
    model = DenseNet(depth=depth, growth=growth, num_classes=7)
    assert count(abstract_variables(model)["params"]) == closed_form(depth, growth, 7)


def test_the_published_network_agrees_with_the_closed_form():
    assert closed_form(100, 12, 10) == 769_162


@pytest.fixture(scope="module")
def published():
    """Shapes of the published network's variables and of every layer's output."""
    init = functools.partial(
        DenseNetBC100_12(norm=nn.LayerNorm).init_with_output,
        train=False,
        capture_intermediates=True,
    )
    _, variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    return variables


def test_layers_append_channels_and_transitions_halve_them(published):
    output = lambda name: published["intermediates"][name]["__call__"][0].shape  # noqa: E731
    assert output("stem_conv") == (1, 32, 32, 24)
    assert output("block1_layer1") == (1, 32, 32, 36)
    assert output("block1_layer16") == (1, 32, 32, 216)
    assert output("transition1") == (1, 16, 16, 108)
    assert output("block2_layer16") == (1, 16, 16, 300)
    assert output("transition2") == (1, 8, 8, 150)
    assert output("block3_layer16") == output("last_norm") == (1, 8, 8, 342)


def test_channels_are_divisible_by_six(published):
    """So a normalization can have 2, 3 or 6 groups, but not 4."""
    scales = traverse_util.flatten_dict(published["params"])
    channels = {leaf.size for path, leaf in scales.items() if path[-1] == "scale"}
    assert len(channels) > 40
    assert {n % 6 for n in channels} == {0}
    assert {n % 4 for n in channels} == {0, 2}


def test_a_layer_hands_its_input_on_untouched():
    x = normal(6, 2, 4, 4, 5)
    layer = _DenseLayer(3, conv=nn.Conv, norm=nn.LayerNorm)
    y, _ = jax.jit(layer.init_with_output)(jax.random.key(0), x)
    assert y.shape == (2, 4, 4, 8)
    chex.assert_trees_all_equal(y[..., :5], x)
    assert jnp.abs(y[..., 5:]).min() > 0
