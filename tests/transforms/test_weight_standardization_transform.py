"""WeightStandardization with a plain model equals the same model built from WSConv."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from oracles import normal, tree_relative_error

from wsbcn_flax import WeightStandardization, WSConv, WSConvTranspose, standardize
from wsbcn_flax.models import CifarResNet
from wsbcn_flax.ops import PRESETS
from wsbcn_flax.training import TrainState, make_train_step
from wsbcn_flax.transforms import ConvolutionKernel, normalized_convolutions

X = normal(1, 2, 8, 8, 3)


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


def parameters_of(model):
    return jax.jit(model.init)(jax.random.key(0), X)["params"]


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def perturbed(params):
    """Moves every parameter, even gains and scales of one, away from its initial value."""
    leaves, structure = jax.tree.flatten(params)
    moved = [leaf + 0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize(("preset", "use_bias"), [("bcn", False), ("nfnet", False), ("wn", True)])
def test_equals_the_model_built_from_ws_conv(preset, use_bias):
    """Outputs and the gradients of all parameters, gains included, are equal."""
    ws_model = Net(lambda *args, **kwargs: WSConv(*args, preset=preset, **kwargs), use_bias)
    params = perturbed(parameters_of(ws_model))
    plain, transform = Net(nn.Conv, use_bias), WeightStandardization(preset=preset)

    def loss_and_gradients(forward):
        def loss_fn(params):
            y = forward(params)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss_fn, has_aux=True))(params)

    actual = loss_and_gradients(lambda p: plain.apply({"params": transform(p)}, X))
    expected = loss_and_gradients(lambda p: ws_model.apply({"params": p}, X))
    assert tree_relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("preset", ["bcn", "nfnet"])
def test_with_gains_gives_a_plain_model_the_parameters_of_ws_conv(preset):
    ws_model = Net(lambda *args, **kwargs: WSConv(*args, preset=preset, **kwargs))
    expected, params = (parameters_of(model) for model in (ws_model, Net(nn.Conv)))
    actual = WeightStandardization(preset=preset).with_gains(params)
    assert set(flat(actual)) == set(flat(expected))
    assert all((flat(actual)[path] == leaf).all() for path, leaf in flat(expected).items())


@pytest.mark.parametrize("preset", PRESETS)
def test_changes_the_kernels_it_takes_and_nothing_else(preset):
    params = perturbed(parameters_of(Net(nn.Conv, use_bias=True)))
    transform = WeightStandardization(preset=preset)
    after = flat(transform(params))
    assert transform.paths(params) == ["conv0/kernel", "conv1/kernel"]
    for path, leaf in flat(params).items():
        if path in ("conv0/kernel", "conv1/kernel"):
            assert (after[path] == standardize(leaf, preset=preset)).all()
            assert not (after[path] == leaf).any()
        else:
            assert after[path] is leaf


def test_folded_parameters_run_in_the_plain_model():
    """Exported for inference, parameters have no gains and need no standardization."""
    transform = WeightStandardization(preset="nfnet")
    model = Net(nn.Conv)
    params = parameters_of(model)
    folded = transform(transform.with_gains(params))
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    ws_model = Net(lambda *args, **kwargs: WSConv(*args, preset="nfnet", **kwargs))
    expected = ws_model.apply({"params": transform.with_gains(params)}, X)
    assert tree_relative_error(model.apply({"params": folded}, X), expected) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        *("head", "heads", "fc", "out", "output", "pred", "predictions", "final", "classifier"),
        *("bbox_pred", "cls_score", "rpn_cls", "mask_out", "decoder_head", "cls_logits"),
        *("rpn_predictor", "box_scores", "final_conv", "out_layer", "outconv", "conv_out"),
        *("Head_0", "head2", "MaskHead_0", "OutputConv_1", "BBOX_PRED", "bbox_pred_3"),
    ],
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


@pytest.mark.parametrize(
    "name", ["scores_conv1x1", "outer", "headless", "prediction_tower", "conv_in", "route", "fcn"]
)
def test_other_names_are_taken(name):
    """Only the end of a name marks an output."""
    params = {name: {"kernel": jnp.ones((3, 3, 4, 4))}, "norm": {"scale": jnp.ones(4)}}
    assert WeightStandardization().paths(params) == [f"{name}/kernel"]


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


def test_nothing_is_taken_where_no_normalization_is():
    params = {"conv": {"kernel": jnp.ones((3, 3, 4, 4))}, "norm": {"bias": jnp.ones(4)}}
    message = r"\[conv/kernel\]. No normalization .*where=normalized_convolutions\(model, inputs\)"
    with pytest.raises(ValueError, match=message):
        WeightStandardization()(params)
    assert WeightStandardization(where="conv").paths(params) == ["conv/kernel"]


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
    params = parameters_of(ws_model)
    assert params["up"]["kernel"].shape == (2, 2, 4, 8)
    convs = WeightStandardization(where="conv")
    ups = WeightStandardization(where="up", out_axis=-2)
    actual = plain.apply({"params": ups(convs(params))}, X)
    assert tree_relative_error(actual, ws_model.apply({"params": params}, X)) < 1e-5
    gains = WeightStandardization(where="up", out_axis=-2, preset="wn").with_gains(params)
    assert gains["up"]["gain"].shape == (4,)


def test_errors_name_the_kernel():
    block = {"depthwise": {"kernel": jnp.ones((1, 1, 1, 8))}, "norm": {"scale": jnp.ones(8)}}
    params = {"block": block}
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


def test_exact_paths_are_taken_literally():
    """This also holds beside patterns; a pattern equal to a path matches that path."""
    kernel = jnp.ones((3, 3, 2, 4))
    params = {name: {"kernel": kernel} for name in ("conv[0]", "conv0", "conv*", "convolution")}
    exact = tuple(ConvolutionKernel(f"{name}/kernel", 4) for name in ("conv[0]", "conv*"))
    transform = WeightStandardization(where=exact)
    assert transform.paths(params) == ["conv[0]/kernel", "conv*/kernel"]
    assert hash(transform) == hash(WeightStandardization(where=list(exact)))
    mixed = WeightStandardization(where=(exact[0], "conv0"))
    assert mixed.paths(params) == ["conv[0]/kernel", "conv0/kernel"]
    assert WeightStandardization(where="conv[0]/kernel").paths({"conv[0]": {"kernel": kernel}})


def test_exact_rules_must_fit_the_parameters():
    with pytest.raises(ValueError, match=r"\['conv/kernel'\] matched none of"):
        WeightStandardization(where=(ConvolutionKernel("conv/kernel", 4),))(PARAMS)
    with pytest.raises(ValueError, match=r"at least the 5 axes .*received shape \(3, 3, 2, 4\)"):
        WeightStandardization(where=(ConvolutionKernel("encoder/conv1/kernel", 5),))(PARAMS)
    with pytest.raises(TypeError, match=r"patterns and ConvolutionKernels, received 4"):
        WeightStandardization(where=("encoder/conv1", 4))(PARAMS)


def test_each_kernel_of_a_model_has_its_own_output_axis():
    class Decoder(nn.Module):
        conv: type[nn.Module]
        up: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            x = nn.GroupNorm(4)(self.conv(8, (3, 3), name="conv")(x))
            x = nn.GroupNorm(4)(self.up(4, (2, 2), transpose_kernel=True, name="up")(x))
            return nn.Conv(2, (1, 1), name="anything")(x)

    for preset in ("bcn", "nfnet"):
        conv, up = (functools.partial(layer, preset=preset) for layer in (WSConv, WSConvTranspose))
        ws_model, plain = Decoder(conv, up), Decoder(nn.Conv, nn.ConvTranspose)
        params = perturbed(parameters_of(ws_model))
        ws = WeightStandardization(preset=preset, where=normalized_convolutions(plain, X))
        actual = plain.apply({"params": ws(params)}, X)
        assert tree_relative_error(actual, ws_model.apply({"params": params}, X)) < 1e-5


class Block(nn.Module):
    conv: type[nn.Module]

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.GroupNorm(4, name="norm")(self.conv(8, (3, 3), name="conv")(x))), None


class Stack(nn.Module):
    """A stem, blocks stacked in one array (by scan or as an ensemble), a convolutional head."""

    conv: type[nn.Module]
    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(4, name="norm")(self.conv(8, (3, 3), name="stem")(x)))
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        if self.kind == "scan":
            x, _ = nn.scan(Block, length=3, **axes)(self.conv, name="blocks")(x, None)
        else:
            mapped = nn.vmap(Block, in_axes=None, axis_size=3, **axes)
            x = mapped(self.conv, name="blocks")(x)[0].mean(0)
        return nn.Conv(5, (1, 1), name="head")(x)


@pytest.mark.parametrize(("kind", "preset"), [("scan", "nfnet"), ("vmap", "bcn")])
def test_stacked_layers_equal_the_stack_of_ws_conv(kind, preset):
    """Axes of stacked layers come from the model, or are given with patterns."""
    ws_model = Stack(functools.partial(WSConv, preset=preset), kind)
    plain = Stack(nn.Conv, kind)
    fresh = parameters_of(ws_model)
    params = perturbed(fresh)
    expected = ws_model.apply({"params": params}, X)
    exact = WeightStandardization(preset=preset, where=normalized_convolutions(plain, X))
    stem = WeightStandardization(preset=preset, where="stem")
    layers = WeightStandardization(preset=preset, where="blocks/*/kernel", stacked_axes=1)
    for transform in (exact, lambda params: layers(stem(params))):
        actual = plain.apply({"params": transform(params)}, X)
        assert tree_relative_error(actual, expected) < 1e-5
    plain_params = parameters_of(plain)
    with_gains = exact.with_gains(plain_params)
    assert jax.tree.map(jnp.shape, with_gains) == jax.tree.map(jnp.shape, fresh)
    # A negative control: standardizing all layers as one kernel gives other outputs.
    flattened = jax.tree.map(lambda x: x, params)
    flattened["blocks"]["conv"]["kernel"] = standardize(params["blocks"]["conv"]["kernel"])
    wrong = plain.apply({"params": stem(flattened)}, X)
    assert tree_relative_error(wrong, expected) > 1e-2


def test_a_pattern_takes_no_stacked_bias():
    params = {"conv": {"kernel": jnp.ones((3, 3, 3, 2, 4)), "bias": jnp.ones((3, 4))}}
    assert WeightStandardization(where="conv", stacked_axes=1).paths(params) == ["conv/kernel"]


@pytest.mark.parametrize("where", ["model", "default"])
def test_an_ensemble_of_whole_trees(where):
    ws_model, plain = (Net(conv, use_bias=True) for conv in (WSConv, nn.Conv))
    params = jax.vmap(lambda key: ws_model.init(key, X)["params"])(
        jax.random.split(jax.random.key(0), 2)
    )
    if where == "model":
        ws = WeightStandardization(where=normalized_convolutions(plain, X))
    else:
        ws = WeightStandardization(stacked_axes=1)
    actual, expected = (
        jax.vmap(lambda params, model=model: model.apply({"params": params}, X))(tree)
        for model, tree in ((plain, ws(params)), (ws_model, params))
    )
    assert tree_relative_error(actual, expected) < 1e-5


STACKED = {
    "conv": {"kernel": jnp.ones((3, 3, 3, 2, 4))},
    "norm": {"scale": jnp.ones((3, 4))},
}


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (STACKED, {}, r"conv/kernel \(3, 3, 3, 2, 4\) .*norm/scale \(3, 4\) .*stacked_axes=0"),
        (STACKED, {"where": "conv"}, r"or pass stacked_axes=1, with where= patterns"),
        (STACKED, {"stacked_axes": 2}, r"does not fit stacked_axes=2"),
        (
            {"conv": {"kernel": jnp.ones((5, 3, 2, 4)), "bias": jnp.ones((5, 4))}},
            {"where": lambda path, array: path == "conv/kernel"},
            r"conv/bias \(5, 4\) does not fit stacked_axes=0",
        ),
        (
            {"stem": {"kernel": jnp.ones((7, 7, 3, 8))}, "norm": {"scale": jnp.ones(8)}},
            {"stacked_axes": 1},
            r"norm/scale \(8,\) does not fit stacked_axes=1.*pass stacked_axes=0",
        ),
        (
            {"blocks": {"conv": STACKED["conv"]}, "other": {"norm": {"scale": jnp.ones(4)}}},
            {},
            r"may be a stack of layers .*ConvolutionKernel\('blocks/conv/kernel', ndim=5\)",
        ),
        (
            {"conv": {"kernel": jnp.ones((2, 3, 3, 3, 2, 4))}, "norm": {"scale": jnp.ones(4)}},
            {},
            r"may be a stack of layers with stacked_axes=0",
        ),
    ],
)
def test_refuses_what_may_be_a_stack(params, options, message):
    with pytest.raises(ValueError, match=message):
        WeightStandardization(**options)(params)


def test_convolutions_over_three_axes_are_told_from_stacks():
    kernel = normal(0, 3, 3, 3, 2, 4)
    beside = {"conv": {"kernel": kernel}, "norm": {"scale": jnp.ones(4)}}
    around = {"inner": {"conv": {"kernel": kernel}}, "norm": {"scale": jnp.ones(4)}}
    biased = {"conv": {"kernel": kernel, "bias": jnp.ones(4)}}
    for params, where in ((beside, None), (around, None), (biased, "conv")):
        (path,) = WeightStandardization(where=where).paths(params)
        assert (flat(WeightStandardization(where=where)(params))[path] == standardize(kernel)).all()


def test_refuses_a_negative_number_of_axes():
    with pytest.raises(ValueError, match=r"stacked_axes .*received -1"):
        WeightStandardization(stacked_axes=-1)


@pytest.mark.parametrize("freeze", [flax.core.freeze, dict])
def test_dictionaries_come_back_as_the_kind_they_were(freeze):
    """A training step needs the parameters' structure unchanged, empty modules included."""
    params = freeze(parameters_of(Net(nn.Conv)) | {"empty": {}})
    transform = WeightStandardization(preset="nfnet")
    with_gains = transform.with_gains(params)
    assert type(with_gains) is type(params)
    assert jax.tree.structure(transform(params)) == jax.tree.structure(params)
    assert jax.tree.structure(transform(with_gains)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "box", [nn.with_partitioning, nn.with_logical_partitioning], ids=["mesh", "logical"]
)
@pytest.mark.parametrize("where", ["model", "default"])
def test_boxes_keep_their_names(box, where):
    init = box(nn.initializers.lecun_normal(), (None, None, None, "model"))
    model = Net(functools.partial(nn.Conv, kernel_init=init))
    boxed = parameters_of(model)
    rule = normalized_convolutions(model, X) if where == "model" else None
    transform = WeightStandardization(preset="nfnet", where=rule)
    assert transform.paths(boxed) == ["conv0/kernel", "conv1/kernel"]
    after = transform(transform.with_gains(boxed))
    kernel = after["conv0"]["kernel"]
    assert type(kernel) is type(boxed["conv0"]["kernel"])
    assert kernel.names == (None, None, None, "model")
    assert jax.tree.structure(after) == jax.tree.structure(boxed)
    expected = transform(nn.unbox(boxed))
    outputs = (model.apply({"params": params}, X) for params in (after, expected))
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(after), expected)
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("kind", ["frozen", "boxed"])
def test_a_training_step_keeps_the_parameters_structure(kind):
    init = nn.initializers.lecun_normal()
    if kind == "boxed":
        init = nn.with_partitioning(init, (None, None, None, "model"))
    model = Net(functools.partial(nn.Conv, kernel_init=init))
    transform = WeightStandardization(preset="nfnet", where=normalized_convolutions(model, X))
    params = transform.with_gains(parameters_of(model))
    params = flax.core.freeze(params) if kind == "frozen" else params

    def loss_fn(params, batch_stats, batch, *, rng):
        return jnp.mean(model.apply({"params": params}, batch) ** 2), (batch_stats, {})

    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn, optimizer, transform=transform))
    state, _ = step(TrainState.create({"params": params}, optimizer), X)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, params)
    assert all(jax.tree.leaves(changed["conv0"]))


def test_boxes_in_stacked_layers():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"metadata_params": {nn.PARTITION_NAME: "layers"}, "length": 3}
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            conv = functools.partial(nn.Conv, kernel_init=init)
            return nn.scan(Block, **axes, **options)(conv, name="blocks")(x, None)[0]

    x = normal(0, 2, 8, 8, 8)
    params = Model().init(jax.random.key(0), x)["params"]
    kernel = WeightStandardization(where=normalized_convolutions(Model(), x))(params)
    kernel = kernel["blocks"]["conv"]["kernel"]
    assert kernel.names == ("layers", None, None, None, "model")
    expected = jax.vmap(standardize)(params["blocks"]["conv"]["kernel"].value)
    assert tree_relative_error(kernel.value, expected) < 1e-6


def test_refuses_what_is_not_a_tree_of_parameters():
    with pytest.raises(TypeError, match=r"nested dictionaries .*received list"):
        WeightStandardization()([PARAMS])
