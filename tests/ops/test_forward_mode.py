"""Forward mode, for tangent kernels, Gauss-Newton and Fisher products, linearized networks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree
from oracles import normal, tree_relative_error

from wsbcn_flax import BatchChannelNorm, WeightStandardization, WSConv
from wsbcn_flax.ops import RunningStats, batch_channel_norm, channel_norm, standardize
from wsbcn_flax.transforms import fold_weight_standardization

pytestmark = pytest.mark.usefixtures("x64")


def draw(seed, *shape):
    return normal(seed, *shape, dtype=jnp.float64)


def assert_forward_is_reverse(function, *primals):
    """Asserts <t, J^T g> = <J t, g>, and that the tangent is the limit of a difference."""
    tangents = tuple(draw(20 + i, *p.shape) for i, p in enumerate(primals))
    y, forward = jax.jit(lambda p, t: jax.jvp(function, p, t))(primals, tangents)
    g = draw(30, *y.shape)
    reverse = jax.jit(lambda p, g: jax.vjp(function, *p)[1](g))(primals, g)
    pulled = sum(jnp.vdot(t, r) for t, r in zip(tangents, reverse, strict=True))
    assert abs(pulled / jnp.vdot(forward, g) - 1) < 1e-10
    step = 1e-6
    ahead, behind = (
        function(*(p + s * t for p, t in zip(primals, tangents, strict=True)))
        for s in (step, -step)
    )
    assert tree_relative_error(forward, (ahead - behind) / (2 * step)) < 1e-6


@pytest.mark.parametrize("preset", ["official", "bit", "nfnet", "wn", "cwn"])
def test_of_standardize(preset):
    assert_forward_is_reverse(
        functools.partial(standardize, preset=preset), 3 + draw(1, 3, 3, 4, 5)
    )


@pytest.mark.parametrize(
    ("statistics", "masked"),
    [("batch", False), ("batch", True), ("estimate", True), ("running", False)],
)
def test_of_batch_channel_norm(statistics, masked):
    x, scale, bias = 1 + draw(1, 3, 4, 5, 12), 1 + 0.1 * draw(2, 12), draw(3, 12)
    running = RunningStats(draw(4, 12), jnp.full(12, 2.0), jnp.zeros(()))
    mask = (
        (jnp.arange(5)[None] < jnp.array([5, 3, 2])[:, None]).reshape(3, 1, 5, 1)
        if masked
        else None
    )
    evaluates = statistics == "running"

    def function(x, scale, bias):
        y, _ = batch_channel_norm(
            x,
            running,
            batch_scale=scale,
            channel_bias=bias,
            num_groups=4,
            order="normalize_first",
            statistics="estimate" if evaluates else statistics,
            use_running_average=evaluates,
            mask=mask,
        )
        return y if mask is None else jnp.where(mask, y, 0)

    assert_forward_is_reverse(function, x, scale, bias)


def test_of_channel_norm():
    assert_forward_is_reverse(
        functools.partial(channel_norm, num_groups=4), 1 + draw(1, 2, 3, 5, 12), draw(2, 12)
    )


class Network(nn.Module):
    """A convolution, raw or standardized, and a normalization."""

    conv: type[nn.Module] = nn.Conv

    @nn.compact
    def __call__(self, x, *, train):
        x = self.conv(8, (3, 3), use_bias=False, param_dtype=jnp.float64, name="conv")(x)
        norm = BatchChannelNorm(num_groups=2, param_dtype=jnp.float64, name="norm")
        return nn.relu(norm(x, use_running_average=not train)).mean((1, 2))


@pytest.mark.parametrize(
    ("kind", "train"), [("transformed", True), ("layers", False), ("folded", True)]
)
def test_a_neural_tangent_kernel_is_the_same_by_either_mode(kind, train):
    """The kernel is J J^T, where J is the Jacobian of a network by its parameters."""
    model = Network(conv=WSConv if kind == "layers" else nn.Conv)
    x = draw(1, 2, 6, 6, 3)
    variables = model.init(jax.random.key(0), x, train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    if kind == "folded":
        params = fold_weight_standardization(params)

    def outputs(params):
        params = WeightStandardization()(params) if kind == "transformed" else params
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, x, train=train, mutable=["batch_stats"])[0].ravel()

    flat, unravel = ravel_pytree(params)
    by_column, by_row = (
        jax.jit(mode(lambda flat: outputs(unravel(flat))))(flat)
        for mode in (jax.jacfwd, jax.jacrev)
    )
    assert tree_relative_error(by_column @ by_column.T, by_row @ by_row.T) < 1e-10


def test_a_linearized_network_is_its_tangent():
    model, x = Network(), draw(1, 2, 6, 6, 3)
    variables = model.init(jax.random.key(0), x, train=False)
    function = functools.partial(model.apply, variables, train=False)
    tangent = draw(2, *x.shape)
    y, push_forward = jax.linearize(function, x)
    expected = jax.jvp(function, (x,), (tangent,))
    assert tree_relative_error((y, push_forward(tangent)), expected) < 1e-12
