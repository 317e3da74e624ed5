"""BatchChannelNorm owns parameters and state; it computes the same as the op."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from oracles import normal

from wsbcn_flax import BatchChannelNorm, batch_channel_norm
from wsbcn_flax.ops import RunningStats

X = 2 + normal(1, 2, 5, 6, 8)


def init(norm, x=X):
    return norm.init(jax.random.key(0), x)


def distinct(variables):
    """Makes variables that all have different values."""
    leaves, structure = jax.tree.flatten(variables)
    leaves = [1 + 0.1 * jnp.abs(normal(i, *leaf.shape)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize("affine", ["group", "channel"])
def test_names_shapes_and_initial_values(affine):
    variables = init(BatchChannelNorm(num_groups=4, affine=affine, use_running_average=False))
    size = {"group": 4, "channel": 8}[affine]
    expected = {
        "params": {
            "batch_scale": jnp.ones(8),
            "batch_bias": jnp.zeros(8),
            "channel_scale": jnp.ones(size),
            "channel_bias": jnp.zeros(size),
        },
        # Initialization updates nothing, whatever the data.
        "batch_stats": {"mean": jnp.zeros(8), "var": jnp.ones(8), "count": jnp.zeros(())},
    }
    chex.assert_trees_all_equal(variables, expected)


@pytest.mark.parametrize("use_running_average", [False, True])
def test_every_option_reaches_the_op(use_running_average):
    options = {
        "num_groups": 2,
        "statistics": "estimate",
        "order": "normalize_first",
        "rate": lambda count: 0.3 / (1 + count),
        "epsilon": 0.1,
    }
    mask = (jnp.arange(6) < 4).reshape(1, 1, 6, 1)
    norm = BatchChannelNorm(**options)
    variables = distinct(norm.init(jax.random.key(0), X, True))
    y, updates = norm.apply(variables, X, use_running_average, mask=mask, mutable=["batch_stats"])
    expected, running = batch_channel_norm(
        X,
        RunningStats(**variables["batch_stats"]),
        **variables["params"],
        **options,
        mask=mask,
        use_running_average=use_running_average,
    )
    chex.assert_trees_all_equal((y, updates["batch_stats"]), (expected, running._asdict()))


@pytest.mark.parametrize("statistics", ["batch", "estimate"])
def test_training_moves_the_statistics_and_evaluation_does_not(statistics):
    norm = BatchChannelNorm(num_groups=4, statistics=statistics)
    variables = norm.init(jax.random.key(0), X, False)
    _, updates = norm.apply(variables, X, False, mutable=["batch_stats"])
    stats = updates["batch_stats"]
    chex.assert_trees_all_close(stats["mean"], 0.1 * jnp.mean(X, (0, 1, 2)), rtol=1e-5)
    assert stats["count"] == 1
    trained = {**variables, **updates}
    _, after = norm.apply(trained, X, True, mutable=["batch_stats"])
    chex.assert_trees_all_equal(after["batch_stats"], stats)
    # Evaluation needs no mutable collection, and uses the statistics from training.
    evaluated, fresh = (norm.apply(v, X, True) for v in (trained, variables))
    assert jnp.abs(evaluated - fresh).max() > 1e-3


def test_the_mode_is_given_once_as_attribute_or_in_the_call():
    variables = init(BatchChannelNorm(num_groups=4, use_running_average=True))
    by_attribute = BatchChannelNorm(num_groups=4, use_running_average=True).apply(variables, X)
    by_call = BatchChannelNorm(num_groups=4).apply(variables, X, use_running_average=True)
    chex.assert_trees_all_equal(by_attribute, by_call)
    with pytest.raises(ValueError, match="use_running_average"):
        BatchChannelNorm(num_groups=4).apply(variables, X)
    with pytest.raises(ValueError, match="use_running_average"):
        BatchChannelNorm(num_groups=4, use_running_average=True).apply(variables, X, False)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return BatchChannelNorm(num_groups=4, use_running_average=False, name="inner_norm")(x)


def test_training_without_mutable_says_where_and_what_to_pass():
    variables = init(Nested())
    with pytest.raises(ValueError, match=r'inner_norm.*mutable=\["batch_stats"\]'):
        Nested().apply(variables, X)


@pytest.mark.parametrize("use_running_average", [False, True])
def test_missing_batch_stats_says_what_to_pass(use_running_average):
    norm = BatchChannelNorm(num_groups=4, use_running_average=use_running_average)
    params = {"params": init(norm)["params"]}
    message = re.escape('{"params": params, "batch_stats": batch_stats}')
    with pytest.raises(ValueError, match=message):
        norm.apply(params, X, mutable=["batch_stats"])


@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [
        (None, jnp.float32),
        (jnp.float32, jnp.bfloat16),
        (jnp.bfloat16, jnp.float16),
        (jnp.float16, jnp.float32),
    ],
)
def test_dtypes(dtype, param_dtype):
    norm = BatchChannelNorm(
        num_groups=4, dtype=dtype, param_dtype=param_dtype, use_running_average=False
    )
    x = X.astype(jnp.bfloat16)
    variables = init(norm, x)
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    assert y.dtype == (dtype or jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(param_dtype)}
    # Statistics in half precision would stop moving at a rate of 0.1.
    for stats in (variables["batch_stats"], updates["batch_stats"]):
        assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32)}


@pytest.mark.usefixtures("x64")
def test_float64_parameters_have_float64_statistics():
    norm = BatchChannelNorm(num_groups=4, param_dtype=jnp.float64, use_running_average=False)
    x = X.astype(jnp.float64)
    variables = init(norm, x)
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    chex.assert_tree_all_finite(y)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates["batch_stats"], variables["batch_stats"])
    assert {leaf.dtype for leaf in jax.tree.leaves((y, variables))} == {jnp.dtype(jnp.float64)}


@pytest.mark.usefixtures("x64")
def test_float32_state_stays_float32_on_float64_inputs():
    norm = BatchChannelNorm(num_groups=4, use_running_average=False)
    variables = init(norm)
    y, updates = norm.apply(variables, X.astype(jnp.float64), mutable=["batch_stats"])
    assert y.dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(updates["batch_stats"], variables["batch_stats"])


def test_initializers_are_of_the_channel_part():
    norm = BatchChannelNorm(
        num_groups=4,
        use_running_average=False,
        scale_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(0.5),
    )
    y, variables = norm.init_with_output(jax.random.key(0), X)
    assert (variables["params"]["batch_scale"] == 1).all()
    assert (y == 0.5).all()


@pytest.mark.parametrize("statistics", ["batch", "estimate"])
def test_init_works_outside_the_device_axis(statistics):
    norm = BatchChannelNorm(
        num_groups=4, axis_name="data", statistics=statistics, use_running_average=False
    )
    x = normal(3, 8, 1, 4, 4, 8)
    variables = init(norm, x[0])
    step = lambda x: norm.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
    _, updates = jax.vmap(step, axis_name="data")(x)
    whole = norm.clone(axis_name=None)
    _, expected = whole.apply(variables, x[:, 0], mutable=["batch_stats"])
    one_of_each = jax.tree.map(lambda a: a[0], updates)
    chex.assert_trees_all_close(one_of_each, expected, rtol=1e-5, atol=1e-6)
