"""NNX layers: random numbers, masks, caches, modes, and NNX's transformations."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from oracles import normal

import wsbcn_flax
from wsbcn_flax.nnx import BatchChannelNorm, WSConv, WSConvTranspose, WSLinear, to_variables
from wsbcn_flax.ops import StandardizationRule

X = normal(1, 2, 4, 4, 8)


def norm(**options):
    return BatchChannelNorm(8, num_groups=2, rngs=nnx.Rngs(0), **options)


REPLACED = {
    "conv": (nnx.Conv, WSConv, (8, 4, (3, 3)), {"preset": "nfnet"}),
    "conv_transpose": (nnx.ConvTranspose, WSConvTranspose, (8, 4, (3, 3)), {"use_bias": False}),
    "linear": (nnx.Linear, WSLinear, (8, 4), {"preset": "bit"}),
    "norm": (nnx.BatchNorm, functools.partial(BatchChannelNorm, num_groups=2), (8,), {}),
    "group_norm": (nnx.GroupNorm, functools.partial(BatchChannelNorm, num_groups=2), (8,), {}),
}


@pytest.mark.parametrize(("plain", "ours", "args", "options"), REPLACED.values(), ids=REPLACED)
def test_draws_the_random_numbers_of_the_layer_that_it_replaces(plain, ours, args, options):
    """So with the same seed, every other layer has the same initial values as before."""
    plain_options = {k: v for k, v in options.items() if k != "preset"}
    plain_options |= {"num_groups": 2} if plain is nnx.GroupNorm else {}

    def next_layer(layer, options):
        rngs = nnx.Rngs(0)
        made = layer(*args, rngs=rngs, **options)
        return made, nnx.Linear(8, 3, rngs=rngs).kernel[...]

    replaced, after_plain = next_layer(plain, plain_options)
    made, after_ours = next_layer(ours, options)
    chex.assert_trees_all_equal(after_ours, after_plain)
    if hasattr(replaced, "kernel"):
        assert isinstance(made, plain)
        chex.assert_trees_all_equal(made.kernel[...], replaced.kernel[...])


@pytest.mark.parametrize("transposed", [False, True])
def test_masked_taps_stay_masked(transposed):
    """The mask is applied after weight standardization, so masked inputs change no output."""
    ours, linen = (
        (WSConvTranspose, wsbcn_flax.WSConvTranspose) if transposed else (WSConv, wsbcn_flax.WSConv)
    )
    mask = jnp.ones((3, 3, 8, 4)).at[:, :, 3].set(0)
    conv = ours(8, 4, (3, 3), mask=mask, rngs=nnx.Rngs(0))
    y = conv(X)
    chex.assert_trees_all_equal(conv(X.at[..., 3].add(100)), y)
    assert jnp.abs(conv(X.at[..., 2].add(100)) - y).max() > 1
    twin = linen(4, (3, 3), mask=mask)
    chex.assert_trees_all_equal(twin.apply(to_variables(conv), X), y)


@pytest.mark.usefixtures("nnx_mode")
def test_equal_layers_share_a_compiled_program():
    traced = []

    @nnx.jit
    def call(model, x):
        traced.append(None)
        return model(x)

    rule = StandardizationRule(denominator="norm", epsilon=1e-6)
    for _ in range(2):
        for preset in ("bcn", rule):
            call(WSConv(8, 4, (3, 3), preset=preset, rngs=nnx.Rngs(0)), X)
        call(norm(), X)
    assert len(traced) == 3


@pytest.mark.usefixtures("nnx_mode")
def test_modes():
    """The argument of a call overrides the attribute, which train, eval and view set."""
    model = nnx.Sequential(WSConv(8, 8, (3, 3), rngs=nnx.Rngs(0)), norm())
    layer = model.layers[1]
    model.eval()
    evaluated = model(X)
    assert layer.count[...] == 0
    view = nnx.view(model, use_running_average=False)
    assert layer.use_running_average
    assert not view.layers[1].use_running_average
    with pytest.raises(ValueError, match="Unused keys"):
        nnx.view(model, running_average=False)
    model.train()
    layer(X, use_running_average=True)
    assert layer.count[...] == 0
    chex.assert_trees_all_equal(model(X), evaluated)  # Equal, since statistics were fresh.
    assert layer.count[...] == 1
    with pytest.raises(ValueError, match=r"needs use_running_average.*model.train\(\)"):
        norm(use_running_average=None)(X)


@pytest.mark.usefixtures("nnx_mode")
def test_eval_shape_makes_shapes_alone():
    shapes = to_variables(nnx.eval_shape(norm))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, to_variables(norm()))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))


def stacked(count):
    make = lambda key: BatchChannelNorm(8, num_groups=2, rngs=nnx.Rngs(key))  # noqa: E731
    return nnx.vmap(make)(jax.random.split(jax.random.key(0), count))


@pytest.mark.usefixtures("nnx_mode")
def test_vmap_of_stacked_layers_is_a_loop():
    xs = jnp.stack([X, 2 * X, X + 1])
    model = stacked(3)
    ys = nnx.vmap(lambda model, x: model(x))(model, xs)
    for index, x in enumerate(xs):
        alone = norm()
        chex.assert_trees_all_close(ys[index], alone(x), atol=1e-5)
        of_one = jax.tree.map(lambda a, i=index: a[i], to_variables(model)["batch_stats"])
        chex.assert_trees_all_close(of_one, to_variables(alone)["batch_stats"], rtol=1e-5)


@pytest.mark.usefixtures("nnx_mode")
def test_vmap_of_a_shared_layer_averages_over_its_axis():
    def call(model):
        mapped = nnx.vmap(lambda model, x: model(x), in_axes=(None, 0), axis_name="parts")
        return mapped(model, X.reshape(2, 1, 4, 4, 8))

    parts, whole = norm(axis_name="parts"), norm()
    chex.assert_trees_all_close(call(parts)[:, 0], whole(X), atol=1e-5)
    chex.assert_trees_all_close(to_variables(parts), to_variables(whole), rtol=1e-5)
    with pytest.raises(ValueError, match=r"shares its statistics over a mapped axis.*axis_name"):
        call(norm())
    call(norm(use_running_average=True))


@pytest.mark.usefixtures("nnx_mode")
def test_scan_over_stacked_layers_and_over_batches_is_a_loop():
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def deep(x, model):
        return model(x)

    model, expected = stacked(2), X
    layers = [norm(), norm()]
    for layer in layers:
        expected = layer(expected)
    chex.assert_trees_all_close(deep(X, model), expected, atol=1e-5)
    for index, layer in enumerate(layers):
        chex.assert_trees_all_close(model.var[index], layer.var[...], rtol=1e-5)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def batches(model, x):
        return model, model(x)

    carried, alone = norm(), norm()
    carried, ys = batches(carried, jnp.stack([X, X + 1]))
    chex.assert_trees_all_close(ys, jnp.stack([alone(X), alone(X + 1)]), atol=1e-5)
    chex.assert_trees_all_close(to_variables(carried), to_variables(alone), rtol=1e-5)


def test_remat_changes_neither_gradient_nor_state():
    def step(call):
        model = norm()
        gradient = nnx.grad(lambda x, model: jnp.sum(jnp.sin(call(model, x))))(X, model)
        return gradient, to_variables(model)

    call = lambda model, x: model(x)  # noqa: E731
    chex.assert_trees_all_close(step(nnx.remat(call)), step(call), rtol=1e-5, atol=1e-6)


BAD = {
    "preset": (lambda: WSConv(8, 4, (3, 3), preset="wsn", rngs=nnx.Rngs(0)), r"one of.*'wsn'"),
    "fan-in": (
        lambda: WSConv(8, 8, (1, 1), feature_group_count=8, rngs=nnx.Rngs(0))(X),
        r"fan-in of at least 2",
    ),
    "integers": (
        lambda: WSConv(8, 8, (3, 3), rngs=nnx.Rngs(0))(X.astype(jnp.int32)),
        r"WSConv needs floating-point.*int32",
    ),
    "groups": (lambda: norm(affine="none"), r"'group', 'channel'.*'none'"),
    "indivisible groups": (
        lambda: BatchChannelNorm(6, num_groups=4, rngs=nnx.Rngs(0)),
        r"num_groups=4 for 6",
    ),
    "rate": (lambda: norm(rate=2.0), r"from 0 to 1, received 2.0"),
    "channels": (lambda: norm()(X[..., :4]), r"mean of shape \(4,\).*received \(8,\)"),
}


@pytest.mark.parametrize(("run", "message"), BAD.values(), ids=BAD)
def test_raises(run, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run()
