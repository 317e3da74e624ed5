"""normalized_convolutions takes exactly the convolutions that a normalization follows."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from wsbcn_flax import BatchChannelNorm, WeightStandardization, WSConv, WSConvTranspose, models
from wsbcn_flax.transforms import ConvolutionKernel, normalized_convolutions

X = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
Norm = functools.partial(nn.GroupNorm, num_groups=2)
Conv = functools.partial(nn.Conv, features=4, kernel_size=(3, 3))


def paths(model, *inputs, **kwargs):
    return [kernel.path for kernel in normalized_convolutions(model, *inputs or (X,), **kwargs)]


class Wrapped(nn.Module):
    """A convolution, the module ``between``, a norm, and an output convolution."""

    between: object
    conv: object = Conv
    norm: object = Norm

    @nn.compact
    def __call__(self, x):
        x = self.norm(name="norm")(self.between(self.conv(name="conv")(x)))
        return Conv(name="last")(jnp.ones(X.shape) + x.sum())


def interpolate(x):
    return jax.image.resize(x, (2, 16, 16, 4), "bilinear")


FOLLOWED = {
    "nothing": lambda x: x,
    "cast": lambda x: x.astype(jnp.bfloat16),
    "reshape": lambda x: x.reshape(2, 64, 4),
    "transpose": lambda x: x.transpose(0, 2, 1, 3)[:, ::-1, 2:, None],
    "residual connection": lambda x: x + jnp.ones(X.shape),
    "concatenation": lambda x: jnp.concatenate([x, x], axis=-1),
    "stack": lambda x: jnp.stack([x, x]).sum(0),
    "unstack": lambda x: jnp.unstack(x, axis=1)[1],
    "tile": lambda x: jnp.tile(x, (1, 1, 1, 2)),
    "split": lambda x: jnp.split(x, 2, axis=1)[1],
    "max pooling": lambda x: nn.max_pool(x, (2, 2), padding="SAME"),
    "average pooling": lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    "global average": lambda x: x.mean((1, 2), dtype=jnp.float32),
    "bilinear interpolation": interpolate,
    "nearest neighbour": lambda x: jax.image.resize(x, (2, 16, 16, 4), "nearest"),
    "dropout": lambda x: nn.Dropout(0.5, deterministic=False)(x),
    "barrier": lambda x: lax.optimization_barrier((jnp.ones(3), x))[1],
    "checkpoint name": lambda x: checkpoint_name(x, "activation"),
    "jit": jax.jit(lambda x: x + 1),
    "remat": jax.checkpoint(lambda x: x + 1),
    "cond": lambda x: lax.cond(x.sum() > 0, lambda x: x, lambda x: jnp.zeros_like(x), x),
    "scan": lambda x: lax.scan(lambda x, _: (x * 2, None), x, None, length=3)[0],
    "scan's later carry": lambda x: lax.scan(
        lambda c, _: ((jnp.zeros_like(x), c[0], c[1]), None), (x, x * 0, x * 0), None, length=3
    )[0][2],
    "scanned axis": lambda x: lax.scan(lambda c, y: (c, y * 2), 0, x)[1],
    "while": lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x),
    "gate": lambda x: x * jax.nn.sigmoid(jnp.ones(X.shape)),
    "standard deviation": lambda x: (x - 1.0) / 2.0,
    **{f.__name__: f for f in (nn.relu, nn.leaky_relu, nn.elu, nn.gelu, nn.silu, nn.relu6)},
}
NOT_FOLLOWED = {
    "sigmoid": nn.sigmoid,
    "tanh": jnp.tanh,
    "softmax": nn.softmax,
    "square root": lambda x: jnp.sqrt(jnp.abs(x)),
    "stop_gradient": lax.stop_gradient,
    "index": lambda x: jnp.arange(16.0).reshape(4, 4)[x.argmax(-1)],
    "integer": lambda x: x.astype(jnp.int32).astype(jnp.float32),
    "condition": lambda x: jnp.where(x > 0, jnp.ones(X.shape), 0.0),
    "the other of a pair": lambda x: lax.optimization_barrier((x, jnp.ones(X.shape)))[1],
    "gate's argument": lambda x: jnp.ones(X.shape) * jax.nn.sigmoid(x),
    "attention": lambda x: jnp.einsum("bijc,bijd->bijd", x, x),
}


@pytest.mark.parametrize("between", FOLLOWED)
def test_follows_what_moves_adds_scales_and_pools(between):
    assert paths(Wrapped(FOLLOWED[between])) == ["conv/kernel"]


@pytest.mark.parametrize("between", NOT_FOLLOWED)
def test_does_not_follow_through_anything_else(between):
    with pytest.raises(ValueError, match=r"none does in Wrapped, .* 2 conv.* 1 norm.*norms="):
        paths(Wrapped(NOT_FOLLOWED[between]))


class Block(nn.Module):
    """A pre-activation block, which can also be the body of a scan."""

    conv: object = Conv
    norm: object = Norm

    @nn.compact
    def __call__(self, x, _=None):
        y = self.conv(name="conv1")(nn.relu(self.norm(name="norm1")(x)))
        y = self.conv(name="conv2")(nn.relu(self.norm(name="norm2")(y)))
        return x + y, None


class Net(nn.Module):
    """A stem, a body, a normalization and an output convolution."""

    body: object
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = self.body(Conv(use_bias=self.use_bias, name="stem")(x))
        return Conv(name="anything")(Norm(name="norm")(x))


def blocks(block):
    def body(x):
        for index in range(2):
            x, _ = block(name=f"block{index}")(x)
        return x

    return body


STACK = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def scanned(block, *, length=3, name="blocks", **options):
    return lambda x: nn.scan(block, length=length, **STACK | options)(name=name)(x, None)[0]


def ensemble(block, *, size=3, name="members", **options):
    mapped = nn.vmap(block, in_axes=None, axis_size=size, **STACK | options)
    return lambda x: mapped(name=name)(x)[0].mean(0)


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return ensemble(Block)(x), None


SEPARATE = ["block0/conv1", "block0/conv2", "block1/conv1", "block1/conv2"]
BODIES = {
    "plain": (blocks(Block), SEPARATE),
    "remat": (blocks(nn.remat(Block)), SEPARATE),
    "jit": (blocks(nn.jit(Block)), SEPARATE),
    "scan": (scanned(Block), ["blocks/conv1", "blocks/conv2"]),
    "scan of remat": (scanned(nn.remat(Block)), ["blocks/conv1", "blocks/conv2"]),
    "shared scan": (
        scanned(Block, variable_axes={}, variable_broadcast="params", split_rngs={"params": False}),
        ["blocks/conv1", "blocks/conv2"],
    ),
    "vmap": (ensemble(Block), ["members/conv1", "members/conv2"]),
    "scan of vmap": (
        scanned(Ensemble),
        ["blocks/members/conv1", "blocks/members/conv2"],
    ),
    "vjp": (
        lambda x: nn.vjp(lambda block, x: block(x)[0], Block(name="block"), x)[0],
        ["block/conv1", "block/conv2"],
    ),
    "jvp": (
        lambda x: nn.jvp(lambda b, x: b(x)[0], Block(name="block"), (x,), (x,), {})[0],
        ["block/conv1", "block/conv2"],
    ),
}


@pytest.mark.parametrize(
    ("body", "use_bias"), [("plain", False), *((body, True) for body in BODIES)]
)
def test_sees_through_flax_transformations(body, use_bias):
    """A kernel of stacked layers is reported with the number of axes of one layer's kernel."""
    make, expected = BODIES[body]
    taken = normalized_convolutions(Net(make, use_bias), X)
    assert taken == tuple(ConvolutionKernel(f"{path}/kernel", 4) for path in [*expected, "stem"])


@pytest.mark.parametrize("layer", ["scan", "vmap"])
def test_stacked_axes_must_lead(layer):
    along = {"variable_axes": {"params": 1}}
    body = (
        scanned(Block, length=5, **along) if layer == "scan" else ensemble(Block, size=5, **along)
    )
    with pytest.raises(
        ValueError, match=r"must lead.*conv1/kernel \(3, 5, 3, 4, 4\) .*params\": 0"
    ):
        paths(Net(body))


def test_a_program_that_jit_has_traced_before_is_traced_again():
    model = Net(blocks(nn.jit(Block)))
    x = jnp.ones(X.shape)
    model.apply(model.init(jax.random.key(0), x), x)
    assert paths(model) == paths(model) == paths(Net(blocks(Block)))


def test_a_convolution_mapped_by_itself():
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = nn.vmap(nn.Conv, in_axes=None, axis_size=5, **STACK)(4, (3, 3), name="conv")
            return nn.LayerNorm()(conv(x))

    assert normalized_convolutions(Mapped(), X) == (ConvolutionKernel("conv/kernel", 4),)


class UNet(nn.Module):
    """A U-Net whose output convolution, beside the normalizations, is named ``out``."""

    out: str
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(Conv, use_bias=self.use_bias)
        down = nn.relu(Norm(name="norm1")(conv(name="conv1")(x)))
        y = nn.relu(Norm(name="norm2")(conv(strides=2, name="conv2")(down)))
        up = nn.ConvTranspose(4, (2, 2), (2, 2), use_bias=self.use_bias, name="up")(y)
        y = jnp.concatenate([down, jax.image.resize(up, down.shape, "bilinear")], -1)
        y = nn.relu(Norm(name="norm3")(conv(name="conv3")(nn.relu(Norm(name="norm4")(y)))))
        return nn.Conv(2, (1, 1), use_bias=self.use_bias, name=self.out)(y)


@pytest.mark.parametrize(
    ("out", "use_bias"), [("out", False), ("heads", True), ("final", True), ("conv4", True)]
)
def test_an_output_convolution_is_not_taken_whatever_its_name(out, use_bias):
    expected = ["conv1/kernel", "conv2/kernel", "conv3/kernel", "up/kernel"]
    assert paths(UNet(out, use_bias)) == expected


class Detector(nn.Module):
    """A trunk and heads in one module with ``setup``; two levels share the heads."""

    use_bias: bool

    def setup(self):
        conv = functools.partial(Conv, use_bias=self.use_bias)
        self.trunk, self.trunk_norm = conv(), Norm()
        self.tower = nn.Sequential([conv(), Norm(), nn.relu, conv(), Norm(), nn.relu])
        self.bbox_pred, self.cls_score, self.rpn_cls = conv(), conv(), conv()
        self.mask_conv, self.mask_norm = conv(), Norm()
        self.mask_up = nn.ConvTranspose(4, (2, 2), (2, 2), use_bias=self.use_bias)
        self.mask_out = conv()

    def __call__(self, x):
        x = nn.relu(self.trunk_norm(self.trunk(x)))
        outputs = []
        for level in (x, nn.avg_pool(x, (2, 2), (2, 2))):
            features = self.tower(level)
            mask = nn.relu(self.mask_up(nn.relu(self.mask_norm(self.mask_conv(features)))))
            objectness = nn.softmax(self.rpn_cls(features))
            outputs += [self.bbox_pred(features), self.cls_score(features)]
            outputs += [self.mask_out(mask), objectness]
        return outputs


@pytest.mark.parametrize("use_bias", [False, True])
def test_a_detectors_heads(use_bias):
    expected = ["mask_conv", "tower/layers_0", "tower/layers_3", "trunk"]
    assert paths(Detector(use_bias)) == [f"{path}/kernel" for path in expected]


class Separable(nn.Module):
    """A depthwise and a pointwise convolution; no norm directly follows the depthwise one."""

    @nn.compact
    def __call__(self, x):
        x = Conv(feature_group_count=4, name="depthwise")(x)
        return nn.BatchNorm(True)(nn.Conv(8, (1, 1), name="pointwise")(x))


def test_another_convolution_is_the_end():
    assert paths(Separable()) == ["pointwise/kernel"]


class OwnNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return (x - x.mean()) * self.param("scale", nn.initializers.ones, ())


class LayerNorm2d(OwnNorm):
    pass


class Standardizer(OwnNorm):
    pass


class NormalHead(OwnNorm):
    pass


class ConvNormAct(nn.Module):
    """A block that does not normalize its input."""

    @nn.compact
    def __call__(self, x):
        return Norm(name="norm")(Conv(name="inner")(x))


class NormalizedWeights(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(Conv(name="inner"))(x)


NORMS = {
    "batch": functools.partial(nn.BatchNorm, True),
    "group": Norm,
    "instance": nn.InstanceNorm,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "no scale": functools.partial(Norm, use_scale=False),
    "bcn": functools.partial(BatchChannelNorm, num_groups=2, use_running_average=True),
    "remat": nn.remat(nn.LayerNorm),
    "named": LayerNorm2d,
}


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_a_normalization(norm):
    assert paths(Wrapped(lambda x: x, norm=NORMS[norm])) == ["conv/kernel"]


def test_standardized_convolutions_are_convolutions():
    conv = functools.partial(WSConv, 4, (3, 3))
    assert paths(Wrapped(lambda x: x, conv=conv)) == ["conv/kernel"]


@pytest.mark.parametrize("norm", [Standardizer, NormalHead, NormalizedWeights])
def test_what_is_not_a_normalization(norm):
    model = Wrapped(lambda x: x, norm=norm)
    with pytest.raises(ValueError, match="none does"):
        paths(model)
    assert paths(model, norms=(norm,)) == ["conv/kernel"]


def test_a_block_named_for_its_normalization_is_not_one():
    assert paths(Wrapped(lambda x: x, norm=ConvNormAct)) == ["norm/inner/kernel"]


def test_layouts_of_transposed_convolutions():
    class Ups(nn.Module):
        @nn.compact
        def __call__(self, x):
            for index, up in enumerate((nn.ConvTranspose, WSConvTranspose)):
                x = Norm()(up(4, (3, 3), transpose_kernel=index == 1, name=f"up{index}")(x))
            return nn.LayerNorm()(nn.Conv(4, 3, name="one_axis")(x))

    assert normalized_convolutions(Ups(), X) == (
        ConvolutionKernel("one_axis/kernel", 3),
        ConvolutionKernel("up0/kernel", 4),
        ConvolutionKernel("up1/kernel", 4, out_axis=-2),
    )


def test_arguments_reach_the_model_as_they_are():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, flag, *, train, dtype):
            assert (flag, train, dtype) == ("flag", True, jnp.float16)
            x = nn.Dropout(0.5, deterministic=not train)(Conv(name="conv")(x))
            x += jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.BatchNorm(use_running_average=not train, name="norm")(x)

    options = {"train": True, "dtype": jnp.float16}
    assert paths(Model(), jnp.ones(X.shape), "flag", **options) == ["conv/kernel"]
    assert normalized_convolutions(Model(), x=X, flag="flag", **options) == (
        ConvolutionKernel("conv/kernel", 4),
    )


def test_another_method():
    class Methods(nn.Module):
        def setup(self):
            self.conv, self.norm = Conv(), Norm()

        def features(self, x):
            return self.norm(self.conv(x))

    assert paths(Methods(), method="features") == ["conv/kernel"]


@pytest.mark.parametrize(
    "init", [nn.with_partitioning, nn.with_logical_partitioning], ids=["mesh", "logical"]
)
def test_boxed_kernels(init):
    conv = functools.partial(Conv, kernel_init=init(nn.initializers.ones, (None,) * 4))
    assert paths(Wrapped(lambda x: x, conv=conv)) == ["conv/kernel"]


def test_a_kernel_that_is_transformed_on_its_way_to_the_convolution():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.WeightNorm(Conv(name="conv"))(x))

    assert paths(Model()) == ["conv/kernel"]


# Public networks at their smallest depth; the others differ from these only in depth.
NETWORKS = {
    "PreResNet110": {"depth": 8},
    "PreResNet164": {"depth": 11},
    "ResNeXt29_8x64d": {"depth": 11},
    "WRN28_10": {"depth": 8},
    "DenseNetBC100_12": {"depth": 10},
    "ResNet18": {"stage_sizes": (1, 1)},
    "ResNet50": {"stage_sizes": (1, 1)},
    "ResNeXt50_32x4d": {"stage_sizes": (1, 1)},
    "VGG16": {"stage_sizes": (1, 2), "stage_features": (8, 8)},
}
MODEL_NORMS = [
    nn.BatchNorm,
    functools.partial(nn.GroupNorm, num_groups=4),
    functools.partial(BatchChannelNorm, num_groups=4),
    functools.partial(BatchChannelNorm, num_groups=4, affine="channel"),
]


@pytest.mark.parametrize(
    ("name", "norm"),
    [*((name, nn.LayerNorm) for name in NETWORKS), *(("WRN28_10", norm) for norm in MODEL_NORMS)],
)
def test_takes_what_the_default_rule_takes_of_every_network(name, norm):
    """This holds for every normalization, so it gives what the published recipes standardize."""
    options = {"features": 16} if name == "WRN28_10" else {}
    model = getattr(models, name)(norm=norm, dtype=jnp.bfloat16, **NETWORKS[name], **options)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    exact = WeightStandardization(where=normalized_convolutions(model, images, train=False))
    assert exact.paths(params) == WeightStandardization().paths(params)


def test_refuses_what_is_not_a_module():
    with pytest.raises(TypeError, match=r"Flax module such as Net\(\), received <class .*Conv"):
        normalized_convolutions(nn.Conv, X)
