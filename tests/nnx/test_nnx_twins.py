"""With the same arrays, every NNX layer and model equals its Linen twin to the bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_twins import LAYERS, MODELS, TWINS

import wsbcn_flax.models
import wsbcn_flax.nnx
from wsbcn_flax.nnx import to_variables

each_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=list(TWINS))


def linen_step(twin):
    """Makes (variables, x) -> (output, gradients of parameters and x, new variables)."""
    module = twin.linen(None)

    def loss(params, x, variables):
        variables = {**variables, "params": params}
        y, updates = module.apply(variables, x, **twin.call, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, {**variables, **updates})

    def step(variables, x):
        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        gradients, (y, after) = grad(variables["params"], x, variables)
        return y, gradients, after

    return jax.jit(step)


def nnx_loss(model, x):
    y = model(x)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y


@nnx.jit
def nnx_step(model, x):
    """Returns the output and the gradients of parameters and x; changes the model."""
    gradients, y = nnx.grad(nnx_loss, argnums=(0, 1), has_aux=True)(model, x)
    return y, gradients


@nnx.jit
def nnx_call(model, x):
    return model(x)


def pure(gradients):
    """Converts gradients, a state in one mode and a model in the other, to dictionaries."""
    state = gradients if isinstance(gradients, nnx.State) else nnx.state(gradients, nnx.Param)
    return nnx.to_pure_dict(state)


def test_every_public_layer_and_model_has_a_twin():
    public = [
        getattr(package, name)
        for package in (wsbcn_flax.nnx, wsbcn_flax.nnx.models)
        for name in package.__all__
    ]
    classes = {getattr(made, "func", made) for made in public}
    modules = {c.__name__ for c in classes if isinstance(c, type) and issubclass(c, nnx.Module)}
    assert modules == {twin.name for twin in TWINS.values()}


@functools.cache
def linen_results(name):
    twin = LAYERS[name]
    return linen_step(twin)(twin.variables, twin.example())


@pytest.mark.usefixtures("nnx_mode")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_what_linen_computes_to_the_bit(name):
    """Output, gradients and state are equal, in each mode of flax.nnx."""
    twin = LAYERS[name]
    model = twin.model()
    y, (of_model, of_x) = nnx_step(model, twin.example())
    expected, gradients, after = linen_results(name)
    chex.assert_trees_all_equal((y, (pure(of_model), of_x)), (expected, gradients))
    chex.assert_trees_all_equal(to_variables(model), after)


@pytest.mark.parametrize("twin", MODELS.values(), ids=list(MODELS))
def test_models_compute_what_linen_computes_to_the_bit(twin):
    """Output and state are equal."""
    model = twin.model()
    y = nnx_call(model, twin.example())
    apply = functools.partial(twin.linen(None).apply, **twin.call, mutable=["batch_stats"])
    expected, updates = jax.jit(apply)(twin.variables, twin.example())
    chex.assert_trees_all_equal(y, expected)
    chex.assert_trees_all_equal(to_variables(model), {**twin.variables, **updates})


@each_twin
def test_variables_have_the_names_shapes_and_dtypes_of_linen(twin):
    """Only initial values differ, since Linen draws them from other keys."""
    shapes = to_variables(nnx.eval_shape(lambda: twin.make(dtype=None, rngs=nnx.Rngs(0))))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, twin.variables)


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50", "ResNeXt50_32x4d"])
def test_published_networks_have_the_names_shapes_and_dtypes_of_linen(name):
    """So checkpoints of one library fit the other."""
    make, norm = getattr(wsbcn_flax.nnx.models, name), wsbcn_flax.nnx.BatchChannelNorm
    shapes = to_variables(nnx.eval_shape(lambda: make(norm=norm, rngs=nnx.Rngs(0))))
    linen = getattr(wsbcn_flax.models, name)(norm=wsbcn_flax.BatchChannelNorm)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    init = functools.partial(linen.init, train=False)
    expected = jax.eval_shape(init, jax.random.key(0), images)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, dict(expected))


@pytest.mark.parametrize("twin", LAYERS.values(), ids=list(LAYERS))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(twin, dtype):
    """The output is finite, near float32's and in the requested dtype; the state is float32."""
    model = twin.model(dtype)
    y, gradients = nnx_step(model, twin.example(dtype))
    chex.assert_tree_all_finite((y, gradients))
    chex.assert_trees_all_equal_shapes_and_dtypes(to_variables(model), twin.variables)
    assert y.dtype == dtype
    expected, _ = nnx_step(twin.model(), twin.example())
    error = jnp.abs(y.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()
    assert error < 30 * jnp.finfo(dtype).eps


@pytest.mark.parametrize("name", [*LAYERS, "cifar_resnet"])
def test_dtypes_and_no_tracer_leaks(name):
    """In float64 everything is float64; networks in bfloat16 have float32 logits."""
    twin = TWINS[name]
    with jax.enable_x64(True), jax.checking_leaks():
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), twin.variables)
        model = twin.model(variables=wide)
        after, y = nnx.eval_shape(called, model, twin.example(jnp.float64))
        chex.assert_trees_all_equal_shapes_and_dtypes(to_variables(after), wide)
        assert y.dtype == jnp.float64
    _, y = nnx.eval_shape(called, twin.model(jnp.bfloat16), twin.example(jnp.bfloat16))
    assert y.dtype == (jnp.float32 if twin.call else jnp.bfloat16)


def called(model, x):
    y = model(x)
    return model, y


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["conv_nfnet", "norm"])
def test_float64(name):
    twin = LAYERS[name]
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), twin.variables)
    y = nnx_call(twin.model(variables=wide), twin.example(jnp.float64))
    expected = nnx_call(twin.model(), twin.example())
    np.testing.assert_allclose(expected, y, atol=1e-4 * float(np.abs(y).max()))
    assert np.abs(expected - y).max() > 0
