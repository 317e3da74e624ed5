"""WeightStandardization on a plain model is the same model built from WSConv."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from oracles import normal, tree_relative_error

from wsbcn_flax import WeightStandardization, WSConv, WSConvTranspose, standardize
from wsbcn_flax.models import CifarResNet
from wsbcn_flax.ops import PRESETS

X = normal(1, 2, 8, 8, 3)


pytestmark = pytest.mark.usefixtures("quick_compilation")


class Net(nn.Module):
    """Two blocks and a convolutional head."""

    conv: type[nn.Module]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        for index in range(2):
            x = self.conv(8, (3, 3), use_bias=self.use_bias, name=f"conv{index}")(x)
            x = nn.relu(nn.GroupNorm(4, name=f"norm{index}")(x))
        return nn.Conv(5, (1, 1), name="head")(x)


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def perturbed(params):
    """The parameters with every leaf, gains and scales of one included, moved from its start."""
    leaves, structure = jax.tree.flatten(params)
    moved = [leaf + 0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_model_built_from_ws_conv(preset, use_bias):
    """In outputs, and in the gradient of every parameter, the gains' included."""
    ws_model = Net(lambda *args, **kwargs: WSConv(*args, preset=preset, **kwargs), use_bias)
    params = perturbed(ws_model.init(jax.random.key(0), X)["params"])
    plain, transform = Net(nn.Conv, use_bias), WeightStandardization(preset=preset)

    def loss_and_gradients(forward):
        def loss_fn(params):
            y = forward(params)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss_fn, has_aux=True))(params)

    actual = loss_and_gradients(lambda p: plain.apply({"params": transform(p)}, X))
    expected = loss_and_gradients(lambda p: ws_model.apply({"params": p}, X))
    assert tree_relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("preset", PRESETS)
def test_with_gains_gives_a_plain_model_the_parameters_of_ws_conv(preset):
    ws_model = Net(lambda *args, **kwargs: WSConv(*args, preset=preset, **kwargs))
    expected, params = (
        model.init(jax.random.key(0), X)["params"] for model in (ws_model, Net(nn.Conv))
    )
    actual = WeightStandardization(preset=preset).with_gains(params)
    assert set(flat(actual)) == set(flat(expected))
    assert all((flat(actual)[path] == leaf).all() for path, leaf in flat(expected).items())


def test_changes_the_kernels_it_takes_and_nothing_else():
    params = perturbed(Net(nn.Conv, use_bias=True).init(jax.random.key(0), X)["params"])
    transform = WeightStandardization()
    after = flat(transform(params))
    assert transform.paths(params) == ["conv0/kernel", "conv1/kernel"]
    for path, leaf in flat(params).items():
        if path in ("conv0/kernel", "conv1/kernel"):
            assert (after[path] == standardize(leaf)).all()
            assert not (after[path] == leaf).any()
        else:
            assert after[path] is leaf


def test_folded_parameters_run_in_the_plain_model():
    """What is exported for inference: no gains, nothing to standardize."""
    transform = WeightStandardization(preset="nfnet")
    model = Net(nn.Conv)
    params = model.init(jax.random.key(0), X)["params"]
    folded = transform(transform.with_gains(params))
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    ws_model = Net(lambda *args, **kwargs: WSConv(*args, preset="nfnet", **kwargs))
    expected = ws_model.apply({"params": transform.with_gains(params)}, X)
    assert tree_relative_error(model.apply({"params": folded}, X), expected) < 1e-5


@pytest.mark.parametrize(
    "name", ["head", "fc", "classifier", "cls_logits", "rpn_predictor", "Head_0"]
)
@pytest.mark.parametrize("use_bias", [False, True])
def test_heads_are_never_taken(name, use_bias):
    kernel = {"kernel": jnp.ones((1, 1, 4, 4))} | ({"bias": jnp.ones(4)} if use_bias else {})
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 4, 4))},
        name: kernel,
        "norm": {"scale": jnp.ones(4)},
        "deep": {name: {"inner": kernel}},
    }
    assert WeightStandardization().paths(params) == ["conv/kernel"]


def test_a_convolution_with_a_bias_needs_a_normalization_beside_it():
    kernel, bias = jnp.ones((3, 3, 4, 4)), jnp.ones(4)
    conv = {"kernel": kernel, "bias": bias}
    params = {
        "normalized": {"conv": conv, "norm": {"scale": bias}},
        "normalized_by_bcn": {"conv": conv, "norm": {"batch_scale": bias}},
        "plain": {"conv": conv},
        "no_bias": {"conv": {"kernel": kernel}},
        "dense": {"kernel": jnp.ones((4, 4))},
    }
    taken = WeightStandardization().paths(params)
    assert taken == [
        "normalized/conv/kernel",
        "normalized_by_bcn/conv/kernel",
        "no_bias/conv/kernel",
    ]


def test_takes_every_convolution_of_the_models_and_not_the_head():
    model = CifarResNet(depth=8, width=4, norm=nn.LayerNorm)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), X, train=False))["params"]
    taken = WeightStandardization().paths(shapes)
    convolutions = [path for path, leaf in flat(shapes).items() if len(leaf.shape) == 4]
    assert taken == convolutions
    assert len(taken) == 1 + 2 * 3 + 2


PARAMS = {
    "encoder": {
        "conv1": {"kernel": jnp.ones((3, 3, 2, 4))},
        "conv2": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.ones(4)},
        "dense": {"kernel": jnp.ones((4, 4))},
    },
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (lambda path, array: "conv2" in path and array.ndim > 1, ["encoder/conv2/kernel"]),
        (lambda path, array: array.ndim == 2, ["encoder/dense/kernel", "head/kernel"]),
        ("encoder/conv1/kernel", ["encoder/conv1/kernel"]),
        ("encoder/conv1", ["encoder/conv1/kernel"]),
        ("encoder/conv*", ["encoder/conv1/kernel", "encoder/conv2/kernel"]),
        (["head", "encoder/conv?/kernel"], None),
        (("*/dense", "head"), ["encoder/dense/kernel", "head/kernel"]),
    ],
)
def test_predicates_and_patterns(where, expected):
    expected = expected or ["encoder/conv1/kernel", "encoder/conv2/kernel", "head/kernel"]
    transform = WeightStandardization(where=where, preset="wn")
    assert transform.paths(PARAMS) == expected
    before, after = flat(PARAMS), flat(transform(PARAMS))
    assert [path for path in before if after[path] is not before[path]] == expected


def test_transposed_convolutions_by_a_second_transform():
    class Decoder(nn.Module):
        conv: type[nn.Module]
        up: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            x = nn.GroupNorm(4)(self.conv(8, (3, 3), use_bias=False, name="conv")(x))
            up = self.up(
                4, (2, 2), strides=(2, 2), use_bias=False, transpose_kernel=True, name="up"
            )
            return nn.GroupNorm(4)(up(x))

    ws_model, plain = Decoder(WSConv, WSConvTranspose), Decoder(nn.Conv, nn.ConvTranspose)
    params = ws_model.init(jax.random.key(0), X)["params"]
    assert params["up"]["kernel"].shape == (2, 2, 4, 8)
    convs = WeightStandardization(where="conv")
    ups = WeightStandardization(where="up", out_axis=-2)
    actual = plain.apply({"params": ups(convs(params))}, X)
    assert tree_relative_error(actual, ws_model.apply({"params": params}, X)) < 1e-5
    gains = WeightStandardization(where="up", out_axis=-2, preset="wn").with_gains(params)
    assert gains["up"]["gain"].shape == (4,)


def test_errors_name_the_kernel():
    params = {"block": {"depthwise": {"kernel": jnp.ones((1, 1, 1, 8))}}}
    with pytest.raises(ValueError, match=r"block/depthwise/kernel: .*fan-in of at least 2"):
        WeightStandardization()(params)


def test_a_rule_that_matches_nothing_lists_what_there_is():
    with pytest.raises(ValueError, match=r"\['decoder/\*'\] matched none"):
        WeightStandardization(where="decoder/*")(PARAMS)
    with pytest.raises(ValueError, match=r"\['decodr/\*'\] matched none of .*encoder/conv1/kernel"):
        WeightStandardization(where=["encoder/*", "decodr/*"]).paths(PARAMS)


def test_patterns_in_a_list_can_be_compiled():
    ws = WeightStandardization(where=["conv*"])
    params = {"conv": {"kernel": normal(0, 3, 3, 2, 4)}}
    assert tree_relative_error(jax.jit(ws)(params), ws(params)) < 1e-5
