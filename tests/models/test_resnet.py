"""ResNet: shapes of its stages, its pooling, what it computes in."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from oracles import normal

from wsbcn_flax.models import Bottleneck, PreActBottleneck, ResNet, ResNet18, ResNet50
from wsbcn_flax.models._resnet import _max_pool

Tiny = functools.partial(ResNet, stage_sizes=(1, 2), features=16, stem_features=8)


def shapes_inside(model, size):
    """The shape and dtype of every submodule's output by its name."""
    images = jnp.ones((1, size, size, 3))
    init = functools.partial(model.init_with_output, train=False, capture_intermediates=True)
    logits, variables = jax.eval_shape(init, jax.random.key(0), images)
    kept = traverse_util.flatten_dict(variables.pop("intermediates"), sep="/")
    return logits, variables, {path.removesuffix("/__call__"): y for path, (y,) in kept.items()}


@pytest.mark.parametrize(("network", "expansion"), [(ResNet18, 1), (ResNet50, 4)])
@pytest.mark.parametrize("size", [224, 225])
def test_stages_halve_the_resolution_and_double_the_channels(network, expansion, size):
    model = network(num_classes=7)
    logits, _, outputs = shapes_inside(model, size)
    assert logits.shape == (1, 7)
    half = lambda n: (n + 1) // 2  # noqa: E731
    resolution = half(size)
    assert outputs["stem_conv"].shape == (1, resolution, resolution, 64)
    for stage, blocks in enumerate(model.stage_sizes):
        resolution = half(resolution)
        for index in range(blocks):
            y = outputs[f"stage{stage + 1}_block{index + 1}"]
            assert y.shape == (1, resolution, resolution, 64 * expansion * 2**stage)


def test_bottlenecks_stride_in_the_3x3_convolution():
    _, _, outputs = shapes_inside(ResNet50(), 64)
    resolutions = [outputs[f"stage2_block1/conv{i}"].shape[1] for i in (1, 2, 3)]
    assert resolutions == [16, 8, 8]


@pytest.mark.parametrize("resolution", [6, 7])
def test_pooling_pads_as_pytorch_does(resolution):
    """By one on each side, with what never is the largest: negative borders stay negative."""
    x = np.asarray(normal(5, 2, resolution, resolution, 3)) - 10
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    size = (resolution - 1) // 2 + 1
    expected = np.empty((2, size, size, 3), np.float32)
    for i, j in np.ndindex(size, size):
        expected[:, i, j] = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    chex.assert_trees_all_equal(np.asarray(_max_pool(x)), expected)


@pytest.mark.parametrize(
    ("block", "outside"), [(Bottleneck, "stem_norm"), (PreActBottleneck, "last_norm")]
)
def test_one_normalization_stands_outside_the_blocks(block, outside):
    _, variables, _ = shapes_inside(Tiny(block=block), 32)
    assert [name for name in variables["params"] if name.endswith("norm")] == [outside]


def test_computes_in_the_dtype_and_keeps_parameters_and_logits_in_float32():
    model = Tiny(block=Bottleneck, dtype=jnp.bfloat16)
    logits, variables, outputs = shapes_inside(model, 32)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    hidden = {y.dtype for path, y in outputs.items() if path not in ("head", "__call__")}
    assert hidden == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("size", [1, 2, 33])
def test_images_of_any_size(size):
    logits, _, _ = shapes_inside(Tiny(block=Bottleneck), size)
    assert logits.shape == (1, 1000)
