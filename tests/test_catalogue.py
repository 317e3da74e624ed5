"""Every public layer and model under JAX's transformations."""

import contextlib
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import CATALOGUE, PARTS
from flax import traverse_util
from jax import lax

from wsbcn_flax import layers, models

assert_close = functools.partial(chex.assert_trees_all_close, rtol=2e-4, atol=2e-5)

# Module-scoped fixtures are shared by index: PARTS are the first entries of CATALOGUE.
each_part = pytest.mark.parametrize(
    "entry", PARTS.values(), ids=list(PARTS), indirect=True, scope="module"
)


@pytest.fixture(scope="module", params=CATALOGUE.values(), ids=list(CATALOGUE))
def entry(request):
    return request.param


@pytest.fixture(scope="module")
def step(entry):
    """The compiled training step; tracing it twice is an error."""
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(entry.apply, n=1))


@pytest.fixture(scope="module")
def loss_fn(entry):
    def loss_fn(params, variables, x, dtype=None):
        y, after = entry.apply({**variables, "params": params}, x, dtype=dtype)
        return jnp.mean(jnp.sin(y.astype(jnp.float32))), (y, after)

    return loss_fn


def strict_promotion(entry):
    """Forbids implicit dtype promotion, except for normalizations, since Flax's use it."""
    return jax.numpy_dtype_promotion("standard" if "scale" in entry.params else "strict")


@pytest.fixture(scope="module")
def gradients(entry, loss_fn):
    """A function (x, dtype) -> (gradients of parameters and x, (output, new variables))."""
    grad = jax.jit(jax.grad(loss_fn, argnums=(0, 2), has_aux=True), static_argnums=3)

    def gradients(x, dtype=None):
        with strict_promotion(entry):
            return grad(entry.variables["params"], entry.variables, x, dtype)

    return gradients


@pytest.fixture(scope="module")
def in_float32(entry, gradients):
    # Checking leaks disables trace caches, which is slow; a test below checks whole networks.
    with jax.checking_leaks() if entry in PARTS.values() else contextlib.nullcontext():
        return gradients(entry.example())


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_every_public_layer_and_model_is_in_the_catalogue():
    """The catalogue has all modules; named networks are partials of these."""
    public = [getattr(package, name) for package in (layers, models) for name in package.__all__]
    classes = {made for made in (getattr(p, "func", p) for p in public) if isinstance(made, type)}
    modules = {made.__name__ for made in classes if issubclass(made, nn.Module)}
    assert modules == {entry.name for entry in CATALOGUE.values()}


def test_names_of_parameters_and_statistics(entry):
    """Checkpoints depend on these names."""
    shapes = jax.eval_shape(
        functools.partial(entry.make(None).init, **entry.call), jax.random.key(0), entry.example()
    )
    names = {
        collection: {path[-1] for path in traverse_util.flatten_dict(tree)}
        for collection, tree in shapes.items()
    }
    assert names.pop("params") == entry.params
    assert names == ({"batch_stats": entry.stats} if entry.stats else {})


@each_part
def test_compiled_equals_eager(entry, step):
    variables, x = entry.variables, entry.example()
    assert_close(step(variables, x), entry.apply(variables, x))


@each_part
@pytest.mark.parametrize("transformation", [jax.vmap, jax.pmap])
def test_vmap_and_pmap_equal_a_loop(entry, step, transformation):
    batches = [entry.example(seed=seed) for seed in (1, 2, 3)]
    mapped = jax.jit if transformation is jax.vmap else lambda function: function
    mapped = mapped(transformation(entry.apply, in_axes=(None, 0)))
    expected = stack([step(entry.variables, x) for x in batches])
    assert_close(mapped(entry.variables, jnp.stack(batches)), expected)


@each_part
def test_scan_equals_a_loop_that_carries_the_statistics_and_compiles_once(entry, step):
    """The new state has the same types as the old one, weak types included."""
    variables = entry.variables
    batches = [entry.example(seed=seed) for seed in (1, 2, 3)]

    def body(variables, x):
        y, after = entry.apply(variables, x)
        return after, y

    last, outputs = jax.jit(lambda v, xs: lax.scan(body, v, xs))(variables, jnp.stack(batches))
    for x, actual in zip(batches, outputs, strict=True):
        y, variables = step(variables, x)
        assert_close(actual, y)
    assert_close(last, variables)
    if entry.stats:
        counts = traverse_util.flatten_dict(last["batch_stats"], sep="/")
        assert {int(v) for path, v in counts.items() if path.endswith("count")} == {3}


def test_gradients_are_finite_and_reach_every_parameter(in_float32):
    gradients, _ = in_float32
    chex.assert_tree_all_finite(gradients)
    for leaf in jax.tree.leaves(gradients):
        assert jnp.abs(leaf).max() > 0


@each_part
def test_remat_changes_no_gradient(entry, loss_fn, in_float32):
    (expected, _), aux = in_float32
    remat = jax.jit(jax.grad(jax.checkpoint(loss_fn), has_aux=True))
    assert_close(
        remat(entry.variables["params"], entry.variables, entry.example()), (expected, aux)
    )


def check_half_precision(entry, in_float32, dtype, y, after):
    """Checks that the output is finite, near float32's, in ``dtype``; the state is float32."""
    _, (expected, _) = in_float32
    chex.assert_tree_all_finite((y, after))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, entry.variables)
    assert y.dtype == (jnp.float32 if entry.returns_logits else dtype)
    error = jnp.abs(y.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()
    assert error < 30 * jnp.finfo(dtype).eps


@each_part
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(entry, gradients, in_float32, dtype):
    found, (y, after) = gradients(entry.example(dtype), dtype)
    chex.assert_tree_all_finite(found)
    check_half_precision(entry, in_float32, dtype, y, after)


@each_part
def test_float64(entry):
    with jax.enable_x64(True):
        wide, single = (
            jax.tree.map(lambda a: a.astype(dtype), entry.variables)  # noqa: B023
            for dtype in (jnp.float64, jnp.float32)
        )
        y, _ = jax.jit(entry.apply)(wide, entry.example(jnp.float64))
        # Also under enable_x64, since dropout drops other values with 32-bit random numbers.
        expected, _ = jax.jit(entry.apply)(single, entry.example())
    np.testing.assert_allclose(expected, y, atol=1e-4 * float(np.abs(y).max()))


def test_whole_networks_in_other_dtypes(entry, in_float32):
    """In bfloat16 networks have the right values, in float64 everything has the right dtypes.

    No tracer leaks.
    """
    if entry not in PARTS.values():
        apply = functools.partial(entry.apply, dtype=jnp.bfloat16)
        with strict_promotion(entry):
            y, after = jax.jit(apply)(entry.variables, entry.example(jnp.bfloat16))
        check_half_precision(entry, in_float32, jnp.bfloat16, y, after)
    with jax.enable_x64(True), jax.checking_leaks():
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), entry.variables)
        y, after = jax.eval_shape(entry.apply, wide, entry.example(jnp.float64))
    assert y.dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(after, wide)


def test_dense_layers_in_scan_in_vmap_equal_a_loop():
    entry = CATALOGUE["densenet"]
    step = jax.jit(entry.apply)
    batches = jnp.stack(
        [jnp.stack([entry.example(seed=2 * i + j) for j in (0, 1)]) for i in (0, 1)]
    )
    body = lambda _, x: (None, jax.checkpoint(entry.apply)(entry.variables, x))  # noqa: E731
    mapped = jax.jit(jax.vmap(lambda xs: lax.scan(body, None, xs)[1]))
    expected = stack([stack([step(entry.variables, x) for x in xs]) for xs in batches])
    assert_close(mapped(batches), expected)
