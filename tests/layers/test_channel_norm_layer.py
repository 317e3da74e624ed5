"""ChannelNorm can replace nn.GroupNorm."""

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal, tree_relative_error

from wsbcn_flax import BatchChannelNorm, ChannelNorm


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options",
    [
        {"num_groups": 4},
        {"num_groups": None, "group_size": 6, "epsilon": 1e-3},
        {"num_groups": 2, "use_bias": False, "scale_init": nn.initializers.constant(0.5)},
        {"num_groups": 1, "use_scale": False, "bias_init": nn.initializers.ones},
    ],
)
def test_equals_flax_group_norm(options):
    """Parameters, output and the gradients of all arrays are equal."""
    x, dy = 1 + normal(1, 3, 4, 5, 12, dtype=jnp.float64), normal(2, 3, 4, 5, 12, dtype=jnp.float64)

    def step(norm):
        variables = norm.init(jax.random.key(0), x)
        y, pull_back = jax.vjp(norm.apply, variables, x)
        return variables, y, pull_back(dy)

    options = {**options, "param_dtype": jnp.float64}
    ours, flaxs = step(ChannelNorm(**options)), step(nn.GroupNorm(**options))
    assert jax.tree.structure(ours) == jax.tree.structure(flaxs)
    assert tree_relative_error(ours[1:], flaxs[1:]) < 1e-11
    assert jax.tree.all(jax.tree.map(jnp.array_equal, ours[0], flaxs[0]))


def test_the_dtype_is_that_of_x_or_the_given_one():
    x = normal(1, 2, 4, 4, 8, dtype=jnp.bfloat16)
    for dtype in (None, jnp.float32):
        y, variables = ChannelNorm(2, dtype=dtype).init_with_output(jax.random.key(0), x)
        assert y.dtype == (dtype or jnp.bfloat16)
        assert variables["params"]["scale"].dtype == jnp.float32


def test_a_mask_leaves_positions_out():
    x = normal(1, 2, 6, 8)
    mask = (jnp.arange(6) < 4).reshape(1, 6, 1)
    norm = ChannelNorm(2)
    variables = norm.init(jax.random.key(0), x)
    y = norm.apply(variables, x, mask=mask)
    assert tree_relative_error(y[:, :4], norm.apply(variables, x[:, :4])) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 2, "group_size": 4}, "one of num_groups and group_size"),
        ({"num_groups": None}, "one of num_groups and group_size"),
        ({"num_groups": None, "group_size": 3}, "group_size to divide"),
        ({"num_groups": 3}, "num_groups to divide"),
    ],
)
def test_groups_that_do_not_fit_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ChannelNorm(**options).init(jax.random.key(0), jnp.ones((2, 4, 8)))


@pytest.mark.parametrize("norm", [ChannelNorm(2), BatchChannelNorm(2, use_running_average=True)])
def test_an_exported_program_takes_any_size(norm):
    x = normal(0, 2, 6, 5, 4)
    variables = norm.init(jax.random.key(0), x)
    shape = (*jax.export.symbolic_shape("b, h, w"), 4)
    apply = jax.jit(lambda x: norm.apply(variables, x))
    exported = jax.export.export(apply)(jax.ShapeDtypeStruct(shape, x.dtype))
    np.testing.assert_allclose(exported.call(x), apply(x), atol=1e-5)
