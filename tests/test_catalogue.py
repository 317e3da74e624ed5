"""What every public layer and model must do under JAX's transformations."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from catalogue import CATALOGUE
from flax import traverse_util
from jax import lax

from wsbcn_flax import layers, models

each_entry = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=list(CATALOGUE))
assert_close = functools.partial(chex.assert_trees_all_close, rtol=2e-4, atol=2e-5)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def loss_fn(entry, params, variables, x, dtype=None):
    y, after = entry.apply({**variables, "params": params}, x, dtype=dtype)
    return jnp.mean(jnp.sin(y.astype(jnp.float32))), (y, after)


def test_every_public_layer_and_model_is_in_the_catalogue():
    """Modules themselves; named networks are partials of one that is here."""
    public = [getattr(package, name) for package in (layers, models) for name in package.__all__]
    classes = {made for made in (getattr(p, "func", p) for p in public) if isinstance(made, type)}
    modules = {made.__name__ for made in classes if issubclass(made, nn.Module)}
    assert modules == {entry.name for entry in CATALOGUE.values()}


@each_entry
def test_names_of_parameters_and_statistics(entry):
    """What checkpoints are made of."""
    shapes = jax.eval_shape(
        functools.partial(entry.make(None).init, **entry.call), jax.random.key(0), entry.example()
    )
    names = {
        collection: {path[-1] for path in traverse_util.flatten_dict(tree)}
        for collection, tree in shapes.items()
    }
    assert names.pop("params") == entry.params
    assert names == ({"batch_stats": entry.stats} if entry.stats else {})


class VariantsTest(chex.TestCase):
    """The same numbers eagerly, compiled, and replicated over devices."""

    @chex.variants(with_jit=True, with_pmap=True)
    @parameterized.named_parameters(CATALOGUE.items())
    def test_compiled_equals_eager(self, entry):
        variables, x = entry.variables, entry.example()
        assert_close(self.variant(entry.apply)(variables, x), entry.apply(variables, x))


@each_entry
def test_gradients_are_finite_and_reach_every_parameter(entry):
    variables, x = entry.variables, entry.example()
    grad = jax.jit(jax.grad(functools.partial(loss_fn, entry), argnums=(0, 2), has_aux=True))
    gradients, _ = grad(variables["params"], variables, x)
    chex.assert_tree_all_finite(gradients)
    for leaf in jax.tree.leaves(gradients):
        assert jnp.abs(leaf).max() > 0


@each_entry
def test_remat_changes_no_gradient(entry):
    variables, x = entry.variables, entry.example()
    loss = functools.partial(loss_fn, entry)
    plain, remat = (
        jax.jit(jax.grad(f, has_aux=True))(variables["params"], variables, x)
        for f in (loss, jax.checkpoint(loss))
    )
    assert_close(remat, plain)


@each_entry
def test_vmap_equals_a_loop(entry):
    variables = entry.variables
    batches = [entry.example(seed=seed) for seed in (1, 2, 3)]
    apply = jax.jit(entry.apply)
    expected = jax.tree.map(lambda *a: jnp.stack(a), *(apply(variables, x) for x in batches))
    y, after = jax.jit(jax.vmap(entry.apply, in_axes=(None, 0)))(variables, jnp.stack(batches))
    assert_close((y, after), expected)


@each_entry
def test_scan_equals_a_loop_that_carries_the_statistics(entry):
    variables = entry.variables
    batches = [entry.example(seed=seed) for seed in (1, 2, 3)]

    def step(variables, x):
        y, after = entry.apply(variables, x)
        return after, y

    last, outputs = jax.jit(lambda v, xs: lax.scan(step, v, xs))(variables, jnp.stack(batches))
    apply = jax.jit(entry.apply)
    for x, actual in zip(batches, outputs, strict=True):
        y, variables = apply(variables, x)
        assert_close(actual, y)
    assert_close(last, variables)
    if entry.stats:
        counts = traverse_util.flatten_dict(last["batch_stats"], sep="/")
        assert {int(v) for path, v in counts.items() if path.endswith("count")} == {3}


@each_entry
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(entry, dtype):
    """Finite, near float32, in the dtype asked for, with the state still in float32."""
    variables, x = entry.variables, entry.example()
    loss = functools.partial(loss_fn, entry)
    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=3)
    gradients, (y, after) = grad(variables["params"], variables, x.astype(dtype), dtype)
    _, (expected, _) = grad(variables["params"], variables, x, None)
    chex.assert_tree_all_finite((gradients, y, after))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, variables)
    assert y.dtype == (jnp.float32 if entry.returns_logits else dtype)
    error = jnp.abs(y.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()
    assert error < 30 * jnp.finfo(dtype).eps


# Flax's own normalizations do not pass.
OURS = {name: entry for name, entry in CATALOGUE.items() if "scale" not in entry.params}


@pytest.mark.parametrize("entry", OURS.values(), ids=list(OURS))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strict_dtype_promotion(entry, dtype):
    """No operation of ours leaves it to JAX which of two dtypes wins."""
    variables, x = entry.variables, entry.example(dtype)
    loss = functools.partial(loss_fn, entry, dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(loss, has_aux=True), variables["params"], variables, x)


@each_entry
def test_a_second_step_does_not_compile(entry):
    """The state that comes out has the types, weak ones included, of the state that goes in."""
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(entry.apply, n=1))
    variables = jax.device_put(entry.variables)
    for seed in range(3):
        _, variables = step(variables, entry.example(seed=seed))


@each_entry
def test_leaks_no_tracer(entry):
    variables, x = entry.variables, entry.example()
    with jax.checking_leaks():
        jax.jit(jax.grad(functools.partial(loss_fn, entry), has_aux=True))(
            variables["params"], variables, x
        )


@each_entry
def test_float64(entry):
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), entry.variables)
        y, after = jax.jit(entry.apply)(variables, entry.example(jnp.float64))
        assert y.dtype == jnp.float64
        chex.assert_trees_all_equal_shapes_and_dtypes(after, variables)
        single, _ = jax.jit(entry.apply)(
            jax.tree.map(lambda a: a.astype(jnp.float32), variables), entry.example()
        )
        np.testing.assert_allclose(single, y, atol=1e-4 * float(jnp.abs(y).max()))
