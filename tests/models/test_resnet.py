"""ResNet: shapes of its stages, pooling, dtypes, frozen stages and dilations."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from oracles import normal

from wsbcn_flax import BatchChannelNorm
from wsbcn_flax.models import (
    VGG16,
    BasicBlock,
    Bottleneck,
    CifarResNet,
    DenseNet,
    PreActBlock,
    PreActBottleneck,
    ResNet,
    ResNet18,
    ResNet50,
)
from wsbcn_flax.models._resnet import max_pool

Tiny = functools.partial(ResNet, stage_sizes=(1, 2), features=16, stem_features=8)


def shapes_inside(model, size):
    """Returns the shape and dtype of every submodule's output, by its name."""
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
    """Pooling pads one position on each side with -inf, so negative borders stay negative."""
    x = np.asarray(normal(5, 2, resolution, resolution, 3)) - 10
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    size = (resolution - 1) // 2 + 1
    expected = np.empty((2, size, size, 3), np.float32)
    for i, j in np.ndindex(size, size):
        expected[:, i, j] = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    chex.assert_trees_all_equal(np.asarray(max_pool(x)), expected)


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


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (ResNet50(num_classes=None), [(16, 256), (8, 512), (4, 1024), (2, 2048)]),
        (CifarResNet(depth=8, num_classes=None), [(64, 16), (32, 32), (16, 64)]),
        (
            CifarResNet(depth=8, num_classes=None, block=PreActBlock),
            [(64, 16), (32, 32), (16, 64)],
        ),
        (VGG16(num_classes=None), [(32, 64), (16, 128), (8, 256), (4, 512), (2, 512)]),
        (DenseNet(depth=10, growth=4, num_classes=None), [(64, 12), (32, 10), (16, 9)]),
    ],
    ids=["resnet", "cifar", "preactivation", "vgg", "densenet"],
)
def test_without_classes_the_features_of_every_stage_come_out(model, shapes):
    features, variables, _ = shapes_inside(model, 64)
    assert [y.shape for y in features] == [(1, size, size, c) for size, c in shapes]
    assert "head" not in variables["params"]


@pytest.mark.parametrize("block", [BasicBlock, PreActBlock])
def test_features_are_what_the_head_sees(block):
    model = Tiny(block=block, num_classes=5)
    images = normal(6, 2, 16, 16, 3)
    logits, variables = model.init_with_output(jax.random.key(0), images, train=False)
    head = variables["params"].pop("head")
    *_, last = model.clone(num_classes=None).apply(variables, images, train=False)
    expected = last.mean((1, 2)) @ head["kernel"] + head["bias"][None]
    chex.assert_trees_all_close(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "frozen"),
    [
        (nn.BatchNorm, 0),
        (nn.BatchNorm, 2),
        *((functools.partial(BatchChannelNorm, num_groups=4), frozen) for frozen in (1, 3)),
    ],
)
def test_frozen_stages_neither_learn_nor_track(norm, frozen):
    """Gradients of frozen stages are zero and their statistics stay; other stages' do not."""
    model = Tiny(block=BasicBlock, num_classes=5, norm=norm, frozen_stages=frozen)
    images = normal(7, 2, 16, 16, 3)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images)
    # A zero scale at the end of a branch would hide the gradients of layers before it.
    params = jax.tree.map(lambda x: x + 0.5 * (x.ndim == 1), variables["params"])

    @jax.jit
    def gradients(params):
        def loss(params):
            variables_ = {**variables, "params": params}
            logits, updates = model.apply(variables_, images, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(logits)), updates["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    gradient, stats = gradients(params)
    parts = [("stem",), ("stage1",), ("stage2",)]
    for number, names in enumerate(parts):
        for tree, before in ((gradient, None), (stats, variables["batch_stats"])):
            moved = [
                bool(jnp.any(leaf != (0 if before is None else old)))
                for name in tree
                if name.startswith(names)
                for leaf, old in zip(
                    jax.tree.leaves(tree[name]),
                    jax.tree.leaves((before or tree)[name]),
                    strict=True,
                )
            ]
            assert moved
            assert any(moved) == (number >= frozen)
    assert jnp.any(gradient["head"]["kernel"] != 0)


@pytest.mark.parametrize("block", [BasicBlock, PreActBottleneck])
def test_dilation_keeps_the_resolution_and_computes_the_same_in_between(block):
    """Dilations (1, 2, 4) give the strided network's features at every 4th position."""
    strided = ResNet(
        stage_sizes=(1, 2, 2), features=8, stem_features=4, block=block, num_classes=None
    )
    dilated = strided.clone(dilations=(1, 2, 4))
    images = normal(8, 1, 64, 64, 3)
    variables = jax.jit(functools.partial(strided.init, train=False))(jax.random.key(0), images)
    params = jax.tree.map(lambda x: x + 0.5 * (x.ndim == 1), variables["params"])
    expected, actual = (
        jax.jit(functools.partial(model.apply, train=False))(
            {**variables, "params": params}, images
        )
        for model in (strided, dilated)
    )
    assert [y.shape[1] for y in expected] == [16, 8, 4]
    assert [y.shape[1] for y in actual] == [16, 16, 16]
    for y, dense, step in zip(expected, actual, (1, 2, 4), strict=True):
        assert jnp.abs(y).max() > 0.1
        chex.assert_trees_all_close(dense[:, ::step, ::step], y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_sizes": (1, 0)}, "at least one block"),
        ({"dilations": (1,)}, "one positive number for each of 2 stages"),
        ({"frozen_stages": 4}, "from 0 to 3, the stem and all stages, received 4"),
    ],
)
def test_refuses_stages_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Tiny(block=BasicBlock, **options)
