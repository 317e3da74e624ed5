"""TPU kernels that replace many small operations: equal results, and use where intended."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from oracles import normal, tree_relative_error

from wsbcn_flax.ops import (
    RunningStats,
    _normalize_groups,
    _one_kernel,
    _weight_standardization,
    batch_channel_norm,
    channel_norm,
    standardize,
)

KERNEL = "tpu_custom_call"


@pytest.fixture
def kernels_run(monkeypatch, traced_anew):
    """Lets the kernels run here as on a TPU; returns the list of kernels that ran."""
    ran = []

    def run_kernel(function, kernel, *arguments):
        ran.append(kernel)
        return kernel(*arguments)

    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    for module in (_one_kernel, _normalize_groups, _weight_standardization):
        monkeypatch.setattr(module, "in_one_kernel", run_kernel)
    return ran


def bcn_and_gradients(affine, x, statistics="estimate", masked=False, **options):
    """Returns the gradient of x, and (output, all other gradients, new statistics)."""
    size = {"group": 4, "channel": 12}[affine]
    dy = normal(2, *x.shape)
    parameters = (normal(3, 12), normal(4, 12), normal(5, size), normal(6, size))
    running = RunningStats(normal(7, 12), jnp.exp(normal(8, 12)), jnp.zeros(()))
    mask = jnp.arange(7).reshape(1, 1, 7, 1) < jnp.array([7, 3, 0]).reshape(3, 1, 1, 1)

    def function(x, *parameters):
        names = ("batch_scale", "batch_bias", "channel_scale", "channel_bias")
        return batch_channel_norm(
            x,
            running,
            **dict(zip(names, parameters, strict=True)),
            num_groups=4,
            statistics=statistics,
            mask=mask if masked else None,
            dtype=jnp.float32,
            **options,
        )

    y, pull_back, new = jax.vjp(function, x, *parameters, has_aux=True)
    dx, *others = pull_back(dy)
    return dx, (y, others, () if "use_running_average" in options else new)


@pytest.mark.parametrize(
    ("affine", "options"),
    [
        ("group", {}),
        ("channel", {"order": "update_first"}),
        ("group", {"masked": True, "rate": lambda count: 1 / (count + 2)}),
        ("channel", {"use_running_average": True}),
        ("group", {"statistics": "batch"}),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_channel_norm_by_kernels(affine, options, dtype, request):
    x = (1 + normal(1, 3, 5, 7, 12)).astype(dtype)
    dx, others = bcn_and_gradients(affine, x, **options)
    ran = request.getfixturevalue("kernels_run")
    actual, actual_others = bcn_and_gradients(affine, x, **options)
    assert len(ran) >= 2
    # In bfloat16 both implementations are within 2e-6 of float64.
    bound = {jnp.float32: 2e-6, jnp.bfloat16: 4e-6}[dtype]
    assert tree_relative_error(actual_others, others) < bound
    assert tree_relative_error(actual, dx) < {jnp.float32: 2e-6, jnp.bfloat16: 2**-8}[dtype]


def test_channel_norm_by_kernels(request):
    x, scale, dy = 1 + normal(1, 2, 5, 7, 12), normal(2, 12), normal(3, 2, 5, 7, 12)

    def step():
        norm = functools.partial(channel_norm, num_groups=3)
        y, pull_back = jax.vjp(norm, x, scale)
        return y, pull_back(dy)

    expected = step()
    ran = request.getfixturevalue("kernels_run")
    actual = step()
    assert len(ran) >= 2
    assert tree_relative_error(actual, expected) < 2e-6


@pytest.mark.parametrize("preset", ["bcn", "official", "nfnet", "wn"])
@pytest.mark.parametrize("shape", [(3, 3, 4, 256), (1, 1, 8, 12), (24, 12)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_standardize_by_kernels(shape, preset, dtype, request):
    kernel, of_hat = 3 + normal(1, *shape), normal(2, *shape).astype(dtype)

    def step():
        function = functools.partial(standardize, preset=preset, dtype=dtype)
        hat, pull_back = jax.vjp(function, kernel)
        return hat, pull_back(of_hat)

    expected, of_kernel = step()
    ran = request.getfixturevalue("kernels_run")
    actual, actual_of_kernel = step()
    both = {_weight_standardization._by_kernel, _weight_standardization._pull_back_by_kernel}
    assert {kernel.func for kernel in ran} == both
    assert actual.dtype == expected.dtype == dtype
    error = {jnp.float32: 5e-6, jnp.bfloat16: 2**-8}[dtype]
    assert tree_relative_error(actual, expected) < error
    assert tree_relative_error(actual_of_kernel, of_kernel) < 5e-6


def train_step(x):
    norm = functools.partial(batch_channel_norm, running=RunningStats.fresh(12), num_groups=4)
    return jax.grad(lambda x: jnp.sum(jnp.sin(norm(x)[0])))(x)


def lowered(function, x, platform="tpu"):
    return jax.jit(function).trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_kernels_are_where_a_device_has_its_own_arrays(mesh8):
    """XLA cannot split a kernel over devices, and other platforms cannot run it."""
    x = jnp.ones((8, 4, 4, 12))
    assert KERNEL in lowered(train_step, x)
    assert KERNEL not in lowered(train_step, x, "cpu")
    for check in (False, True):
        sharded = jax.shard_map(
            train_step, mesh=mesh8, in_specs=P("data"), out_specs=P("data"), check_vma=check
        )
        assert KERNEL in lowered(sharded, x)
    placed = jax.device_put(x, jax.NamedSharding(mesh8, P("data")))
    assert KERNEL not in lowered(train_step, placed)


def test_everywhere_else_the_function_itself_is_used():
    """No kernel is used for many samples, vmap, transposed kernels or second derivatives."""
    x = jnp.ones((2, 4, 4, 12))
    assert KERNEL not in lowered(train_step, jnp.ones((16384, 1, 2, 12)))
    assert KERNEL not in lowered(jax.vmap(train_step), x[None])
    assert KERNEL not in lowered(functools.partial(standardize, out_axis=-2), x)
    assert KERNEL in lowered(standardize, x)
    hessian = lowered(jax.grad(lambda x: jnp.sum(train_step(x) ** 2)), x)
    assert hessian.count(KERNEL) < 2 * lowered(train_step, x).count(KERNEL)
