"""The networks of Mask R-CNN: their size, their standardized kernels, and their outputs."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from oracles import normal

from wsbcn_flax import BatchChannelNorm, WSConv
from wsbcn_flax.models import Bottleneck, ResNet, ResNet50, ResNeXt101_32x4d
from wsbcn_flax.models.detection import FPN, BoxHead, MaskHead, MaskRCNN, RPNHead
from wsbcn_flax.models.detection._mask_head import _Deconv
from wsbcn_flax.transforms import normalized_convolutions

GN = functools.partial(nn.GroupNorm, num_groups=4, epsilon=1e-5)
BCN = functools.partial(BatchChannelNorm, num_groups=4)


def published(backbone=ResNet50, **options):
    norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-5)
    return MaskRCNN(backbone(num_classes=None, norm=norm), num_classes=80, norm=norm, **options)


def tiny(*, conv=nn.Conv, norm=GN, dtype=None, frozen_stages=0, **options):
    backbone = ResNet(
        (1, 1, 1, 1),
        features=16,
        block=Bottleneck,
        stem_features=8,
        num_classes=None,
        frozen_stages=frozen_stages,
        conv=conv,
        norm=norm,
        dtype=dtype,
    )
    return MaskRCNN(
        backbone, num_classes=2, features=8, hidden=16, conv=conv, norm=norm, dtype=dtype, **options
    )


def shapes_of(model):
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))
    return traverse_util.flatten_dict(variables["params"], sep="/")


def variables_of(model, seed=0):
    """Makes random variables, since scales of one and biases of zero would hide errors."""
    init = functools.partial(model.init, train=False)
    shapes = dict(jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 64, 64, 3))))
    leaves, structure = jax.tree.flatten(shapes["params"])
    params = [0.3 * normal(seed + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    return {**ones, "params": jax.tree.unflatten(structure, params)}


def standardized(model):
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return [kernel.path for kernel in normalized_convolutions(model, images, train=False)]


# The numbers are those of a Mask R-CNN built from torchvision's parts.
def test_parameters_of_the_published_network():
    shapes = shapes_of(published())
    assert sum(leaf.size for leaf in shapes.values()) == 45_715_509
    assert sum(path.endswith("scale") for path in shapes) == 69


def test_standardizes_the_convolutions_that_the_authors_standardize():
    paths = standardized(published())
    assert len(paths) == 69
    plain = {p for p in shapes_of(published()) if p.endswith("kernel")} - set(paths)
    assert plain == {
        "rpn/conv/kernel",
        "rpn/logits/kernel",
        "rpn/deltas/kernel",
        "box_head/fc6/kernel",
        "box_head/logits/kernel",
        "box_head/deltas/kernel",
        "mask_head/deconv/kernel",
        "mask_head/logits/kernel",
    }


def test_faster_r_cnn_has_no_mask_head():
    model = published(ResNeXt101_32x4d, with_mask=False)
    assert not any(path.startswith("mask_head") for path in shapes_of(model))
    assert len(standardized(model)) == 104 + 8 + 4
    with pytest.raises(ValueError, match="Masks need a mask head"):
        model.apply({}, jnp.ones((1, 14, 14, 256)), train=False, method="segment")


def test_injected_ws_convolutions_are_the_same():
    """The network uses ``conv`` exactly where a normalization follows."""
    called = set()

    def note(next_fun, args, kwargs, context):
        if isinstance(context.module, WSConv) and context.method_name == "__call__":
            called.add("/".join((*context.module.path, "kernel")))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes_of(tiny(conv=WSConv))
    assert called == set(standardized(tiny()))


def every_part(model, images, small, large):
    """Applies the pyramid and all heads, to images and to regions that are not zeros."""
    levels = model.pyramid(images, train=False)
    boxes, masks = model.classify(small, train=False), model.segment(large, train=False)
    return levels, model.propose(levels), boxes, masks


def test_shapes_and_dtypes():
    """Logits and deltas are float32 in every computation dtype."""
    model = tiny(dtype=jnp.bfloat16)
    inputs = [jnp.ones(shape) for shape in [(1, 64, 96, 3), (3, 7, 7, 8), (2, 14, 14, 8)]]
    levels, proposals, boxes, masks = jax.eval_shape(
        nn.apply(every_part, model), variables_of(model), *inputs
    )
    bf16, f32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert [(x.shape, x.dtype) for x in levels] == [((1, *size, 8), bf16) for size in sizes]
    for (logits, deltas), (height, width) in zip(proposals, sizes, strict=True):
        anchors = 3 * height * width
        assert (logits.shape, deltas.shape) == ((1, anchors), (1, anchors, 4))
    assert [x.shape for x in (*boxes, masks)] == [(3, 3), (3, 3, 4), (2, 28, 28, 3)]
    assert {x.dtype for x in jax.tree.leaves((proposals, boxes, masks))} == {f32}


def test_the_pyramid_is_its_equation():
    """The pyramid has identity kernels of 1x1 and 3x3, and no normalization."""

    class Identity(nn.Module):
        dtype: object = None

        @nn.compact
        def __call__(self, x):
            return x

    stages = [normal(1, 1, 5, 8, 4), normal(2, 1, 3, 4, 4)]
    fpn = FPN(4, norm=Identity)
    params = fpn.init(jax.random.key(0), stages, train=False)["params"]
    identity = {
        name: {"kernel": jnp.zeros_like(p["kernel"]).at[s // 2, s // 2].set(jnp.eye(4))}
        for name, p in params.items()
        if (s := len(p["kernel"]))
    }
    p2, p3, p4 = fpn.apply({"params": identity}, stages, train=False)
    fine, coarse = map(np.asarray, stages)
    merged = fine + coarse.repeat(2, axis=1).repeat(2, axis=2)[:, :5]
    chex.assert_trees_all_close((p2, p3, p4), (merged, coarse, coarse[:, ::2, ::2]))


def test_anchors_are_in_the_order_of_rows_columns_and_anchors():
    level = normal(1, 1, 2, 3, 4)
    head = RPNHead(4, num_anchors=2)
    ((logits, deltas),), variables = head.init_with_output(jax.random.key(0), [level])
    ((larger, _),) = head.apply(variables, [jnp.pad(level, ((0, 0), (0, 4), (0, 4), (0, 0)))])
    # The convolution pads with zeros too, so the logits are the same, in longer rows.
    larger = larger.reshape(1, 6, 7, 2)[:, :2, :3]
    chex.assert_trees_all_close(larger, logits.reshape(1, 2, 3, 2), rtol=1e-5, atol=1e-7)
    assert deltas.shape == (1, 12, 4)


def test_the_transposed_convolution():
    x, deconv = normal(1, 2, 3, 4, 5), _Deconv(6)
    params = {"kernel": normal(2, 2, 2, 5, 6), "bias": normal(3, 6)}
    y = deconv.apply({"params": params}, x)
    assert y.shape == (2, 6, 8, 6)
    for row, column in np.ndindex(2, 2):
        expected = jnp.einsum("nhwi,io->nhwo", x, params["kernel"][row, column])
        expected += params["bias"][None, None, None]
        chex.assert_trees_all_close(y[:, row::2, column::2], expected, rtol=1e-5, atol=1e-5)


def deviation(fan, gain=1.0):
    return (gain / fan) ** 0.5


@pytest.mark.parametrize(
    ("head", "shape", "expected"),
    [
        (
            BoxHead(7, features=32, hidden=64, norm=GN),
            (1, 7, 7, 32),
            {"conv1": 0.01, "fc6": deviation(7 * 7 * 32), "logits": 0.01, "deltas": 0.001},
        ),
        (
            MaskHead(31, features=32, norm=GN),
            (1, 14, 14, 32),
            {
                "conv4": deviation(9 * 32, 2.0),
                "deconv": deviation(4 * 32, 2.0),
                "logits": deviation(32, 2.0),
            },
        ),
    ],
    ids=["box", "mask"],
)
def test_initial_deviations_of_the_heads(head, shape, expected):
    init = functools.partial(head.init, train=False)
    params = jax.jit(init)(jax.random.key(0), jnp.ones(shape))["params"]
    actual = {name: float(params[name]["kernel"].std()) for name in expected}
    assert actual == pytest.approx(expected, rel=0.1)
    assert not any(np.any(p["bias"]) for p in params.values() if "bias" in p)


def test_initial_deviations_of_pyramid_and_proposals():
    levels = [jnp.ones((1, 4, 4, 32)), jnp.ones((1, 2, 2, 64))]
    pyramid = jax.jit(functools.partial(FPN(32, norm=GN).init, train=False))
    params = pyramid(jax.random.key(0), levels)["params"]
    for name, fan in {"inner2_conv": 32, "inner3_conv": 64, "layer3_conv": 9 * 32}.items():
        kernel = np.asarray(params[name]["kernel"])
        assert kernel.std() == pytest.approx(deviation(fan), rel=0.1)
        assert abs(kernel).max() <= deviation(fan, 3.0)  # The distribution is uniform.
    params = jax.jit(RPNHead(32).init)(jax.random.key(0), levels[:1])["params"]
    for layer in params.values():
        assert float(layer["kernel"].std()) == pytest.approx(0.01, rel=0.2)


def test_the_pyramid_of_a_padded_image_is_that_of_the_image():
    model, image = tiny(norm=BCN), normal(0, 1, 41, 60, 3)
    padded = jnp.full((1, 64, 96, 3), 7.0).at[:, :41, :60].set(image)
    variables = variables_of(model)

    @jax.jit
    def pyramid(image, image_hw=None):
        options = {"train": True, "mutable": ["batch_stats"], "method": "pyramid"}
        return model.apply(variables, image, image_hw=image_hw, **options)

    levels, updates = pyramid(image)
    of_padded, padded_updates = pyramid(padded, jnp.array([[41, 60]]))
    for level, other in zip(levels, of_padded, strict=True):
        _, height, width, _ = level.shape
        chex.assert_trees_all_close(other[:, :height, :width], level, rtol=1e-3, atol=1e-3)
        assert np.count_nonzero(other) == np.count_nonzero(other[:, :height, :width])
    chex.assert_trees_all_close(padded_updates, updates, rtol=1e-4, atol=1e-4)
