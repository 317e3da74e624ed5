"""batch_channel_norm compared with the authors' arrays, Flax and float64 numpy; its invariants."""

import functools
import itertools
import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec as P
from oracles import normal, relative_error, tree_relative_error, value_and_vjp

from wsbcn_flax.ops import RunningStats, batch_channel_norm, channel_norm

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
STATISTICS_AND_ORDER = [
    ("batch", "update_first"),
    ("estimate", "update_first"),
    ("estimate", "normalize_first"),
]
each_kind = pytest.mark.parametrize(("statistics", "order"), STATISTICS_AND_ORDER)


def parameters(features, num_groups, dtype=jnp.float32, seed=10):
    """Makes distinct values of all four parameters, those of the channel part per group."""
    sizes = (features, features, num_groups, num_groups)
    values = [normal(seed + i, size, dtype=dtype) for i, size in enumerate(sizes)]
    return [1 + 0.2 * v if i % 2 == 0 else v for i, v in enumerate(values)]


@functools.cache
def with_parameters(**options):
    """Makes f(x, batch_scale, batch_bias, channel_scale, channel_bias, running, mask)."""

    def function(x, batch_scale, batch_bias, channel_scale, channel_bias, running, mask=None):
        return batch_channel_norm(
            x,
            running,
            batch_scale=batch_scale,
            batch_bias=batch_bias,
            channel_scale=channel_scale,
            channel_bias=channel_bias,
            mask=mask,
            **options,
        )

    return function


@functools.partial(jax.jit, static_argnums=0)
def value_gradients_and_stats(function, primals, dy, running, mask=None):
    y, vjp, new = jax.vjp(lambda *p: function(*p, running, mask), *primals, has_aux=True)
    return y, vjp(dy), new


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(batch_channel_norm, **options))


def running_stats(seed, features, dtype=jnp.float32):
    mean, log_var = normal(seed, 2, features, dtype=dtype)
    return RunningStats(mean, jnp.exp(log_var), jnp.asarray(3, dtype))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("statistics", ["batch", "estimate"])
def test_equals_the_authors_code(statistics, dtype):
    """Four steps of training with every gradient, then evaluation."""
    with np.load(GOLDEN / f"bcn_{statistics}.npz") as archive:
        golden = dict(archive)
    get = lambda name: jnp.asarray(golden[name], dtype)  # noqa: E731
    names = ("batch_scale", "batch_bias", "group_scale", "group_bias")
    values = [get(name) for name in names]
    options = {
        "num_groups": int(golden["num_groups"]),
        "statistics": statistics,
        "order": "update_first",
        "rate": float(golden["rate"]),
    }
    running = RunningStats.fresh(golden["batch_scale"].size, dtype)
    count = golden["0_x_nhwc"][..., 0].size
    for t in range(4):
        y, gradients, running = value_gradients_and_stats(
            with_parameters(**options), (get(f"{t}_x_nhwc"), *values), get(f"{t}_dy_nhwc"), running
        )
        var = running.var
        if statistics == "batch":
            # PyTorch's running variance is unbiased; ours, like Flax's, is biased. In both the
            # initial variance has weight (1 - rate)^t; the rest differs by n / (n - 1).
            initial = (1 - options["rate"]) ** (t + 1)
            var = initial + (var - initial) * (count / (count - 1))
        actual = {"y_nhwc": y, "dx_nhwc": gradients[0], "mean_after": running.mean}
        actual |= {"var_after": var, "d" + names[0]: gradients[1], "d" + names[1]: gradients[2]}
        actual |= {"d" + names[2]: gradients[3], "d" + names[3]: gradients[4]}
        for name, value in actual.items():
            assert value.dtype == dtype
            assert relative_error(value, golden[f"{t}_{name}"]) < TOLERANCE[dtype], (t, name)
    assert running.count == 4
    # The authors' evaluation uses their own running variance.
    running = running._replace(var=var)
    evaluate = with_parameters(**options, use_running_average=True)
    y, unchanged = evaluate(get("eval_x_nhwc"), *values, running)
    assert relative_error(y, golden["eval_y_nhwc"]) < TOLERANCE[dtype]
    chex.assert_trees_all_equal(unchanged, running)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(9, 12), (2, 3, 4, 5, 12)])
def test_batch_statistics_equal_flax_batch_norm_then_group_norm(shape):
    x, dy = (1 + normal(seed, *shape, dtype=jnp.float64) for seed in (1, 2))
    values = parameters(12, 4, jnp.float64)
    running = running_stats(3, 12, jnp.float64)

    def flax_norms(x, batch_scale, batch_bias, channel_scale, channel_bias, running, _):
        batch_norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, use_running_average=False)
        y, updates = batch_norm.apply(
            {
                "params": {"scale": batch_scale, "bias": batch_bias},
                "batch_stats": {"mean": running.mean, "var": running.var},
            },
            x,
            mutable=["batch_stats"],
        )
        scale, bias = jnp.repeat(channel_scale, 3), jnp.repeat(channel_bias, 3)
        norm = nn.GroupNorm(4, epsilon=1e-5)
        new = RunningStats(**updates["batch_stats"], count=running.count + 1)
        return norm.apply({"params": {"scale": scale, "bias": bias}}, y), new

    ours = with_parameters(num_groups=4, statistics="batch")
    actual, expected = (
        value_gradients_and_stats(f, (x, *values), dy, running) for f in (ours, flax_norms)
    )
    assert tree_relative_error(actual, expected) < 1e-10


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@each_kind
def test_equals_the_definition(statistics, order, rate):
    x, running = 1 + normal(1, 3, 5, 7, 12, dtype=jnp.float64), running_stats(2, 12, jnp.float64)
    values = parameters(12, 4, jnp.float64)
    options = {"num_groups": 4, "statistics": statistics, "order": order, "rate": rate}
    y, new = with_parameters(**options)(x, *values, running)
    affine = [np.repeat(np.asarray(v), 12 // v.size) for v in values]
    expected = oracles.batch_channel_norm(x, running.mean, running.var, affine=affine, **options)
    assert tree_relative_error((y, new.mean, new.var), tuple(expected)) < 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", ["update_first", "normalize_first"])
def test_estimates_are_constants_to_the_gradient(order):
    x, dy = (normal(seed, 3, 4, 4, 6, dtype=jnp.float64) for seed in (1, 2))
    running = running_stats(3, 6, jnp.float64)
    ours = compiled(num_groups=2, order=order)
    _, new = ours(x, running)
    used = new if order == "update_first" else running

    def constants(x):
        y = (x - used.mean[None, None, None]) / jnp.sqrt(used.var + 1e-5)[None, None, None]
        return channel_norm(y, num_groups=2)

    actual, expected = (
        value_and_vjp(f, (x,), dy) for f in (lambda x: ours(x, running)[0], constants)
    )
    assert tree_relative_error(actual, expected) < 1e-12


@each_kind
def test_float32_error(statistics, order):
    """The reference is float64 numpy on the same float32 input, near and far from zero.

    If the running statistics are the moments of the batch, the error is ten times smaller.
    """
    norm = compiled(num_groups=4, statistics=statistics, order=order)
    signs = (np.ones(16), np.where(np.arange(16) % 3 == 0, -1.0, 1.0))
    for sign, ratio in itertools.product(signs, [0.0, 1.0, 1e1, 1e2, 1e3]):
        center = jnp.asarray(sign * ratio, jnp.float32)[None, None, None]
        x = center + normal(1, 2, 14, 14, 16)
        wide = np.asarray(x, np.float64)
        mean, var = (jnp.asarray(f((0, 1, 2)), jnp.float32) for f in (wide.mean, wide.var))
        steady = RunningStats(mean, var, jnp.float32(100))
        for running, bound in ((RunningStats.fresh(16), 1e-4), (steady, 1e-5)):
            y, new = norm(x, running)
            expected = oracles.batch_channel_norm(
                x, running.mean, running.var, num_groups=4, statistics=statistics, order=order
            )
            error = tree_relative_error((y, new.mean, new.var), tuple(expected))
            assert error <= bound, (sign, ratio)


@each_kind
def test_float32_gradient_error(statistics, order):
    function = with_parameters(num_groups=4, statistics=statistics, order=order)
    for ratio in (0.0, 1e1, 1e3):
        x, dy = ratio + normal(1, 2, 14, 14, 16), normal(2, 2, 14, 14, 16)
        running = RunningStats.fresh(16)._replace(mean=jnp.full(16, ratio, jnp.float32))
        arguments = ((x, *parameters(16, 4)), dy, running)
        actual = value_gradients_and_stats(function, *arguments)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda a: a.astype(jnp.float64), arguments)
            assert (
                tree_relative_error(actual, value_gradients_and_stats(function, *wide)) <= 1e-4
            ), ratio


@each_kind
def test_bfloat16_gradient_error(statistics, order):
    """Output and gradients have small errors; only the gradient of x is rounded to bfloat16."""
    options = {"num_groups": 4, "statistics": statistics, "order": order, "dtype": jnp.float32}
    for ratio in (0.0, 1e1, 1e2, 1e3):
        x = (ratio + normal(1, 2, 14, 14, 16)).astype(jnp.bfloat16)
        running = RunningStats.fresh(16)._replace(mean=jnp.full(16, ratio, jnp.float32))
        arguments = ((x, *parameters(16, 4)), normal(2, 2, 14, 14, 16), running)
        actual = value_gradients_and_stats(with_parameters(**options), *arguments)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda a: a.astype(jnp.float64), arguments)
            of_wide = with_parameters(**{**options, "dtype": jnp.float64})
            y, gradients, new = value_gradients_and_stats(of_wide, *wide)
            bound = max(1e-5, 3e-7 * ratio)
            assert tree_relative_error((actual[0], actual[2]), (y, new)) < 1e-5, ratio
            assert tree_relative_error(actual[1][1:], gradients[1:]) < bound, ratio
            assert relative_error(actual[1][0], gradients[0]) < 2**-7, ratio


def test_float8_is_computed_in_float32():
    x = normal(1, 2, 8, 8, 12).astype(jnp.float8_e4m3fn)
    norm, running = compiled(num_groups=4), RunningStats.fresh(12)
    (y, new), wide = norm(x, running), norm(x.astype(jnp.float32), running)
    chex.assert_trees_all_equal((y, new), (wide[0].astype(x.dtype), wide[1]))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@each_kind
def test_half_precision_is_rounded_only_at_the_end(statistics, order, dtype):
    x, running = 3 + normal(1, 2, 8, 8, 12, dtype=dtype), running_stats(2, 12)
    options = {"num_groups": 4, "statistics": statistics, "order": order}
    y, new = compiled(**options)(x, running)
    expected = oracles.batch_channel_norm(
        np.asarray(x).astype(np.float64), running.mean, running.var, **options
    )
    assert y.dtype == dtype
    assert new.mean.dtype == new.var.dtype == jnp.float32
    assert relative_error(y, expected.y) < float(jnp.finfo(dtype).eps)
    assert tree_relative_error((new.mean, new.var), expected[1:]) < 1e-5
    wide = functools.partial(batch_channel_norm, dtype=jnp.float32, **options)
    assert jax.eval_shape(wide, x, running)[0].dtype == jnp.float32


def valid_pixels(x, mask):
    """Returns the valid positions of all samples as a batch [N, C]."""
    return np.asarray(x)[np.broadcast_to(np.asarray(mask, bool)[..., 0], x.shape[:-1])]


def unequal_masks(batch, height, width):
    """Makes masks with a rectangle of a different size in each sample."""
    rows, columns = np.indices((height, width))
    masks = [(rows <= i % height) & (columns <= (2 * i + 1) % width) for i in range(batch)]
    return jnp.asarray(np.stack(masks)[..., None])


@pytest.mark.usefixtures("x64")
@each_kind
def test_masked_statistics_weigh_every_pixel_once(statistics, order):
    x, mask = normal(1, 3, 6, 8, 12, dtype=jnp.float64), unequal_masks(3, 6, 8)
    x = x + jnp.arange(3.0).reshape(3, 1, 1, 1)  # A mean of the samples' means is then wrong.
    running = running_stats(2, 12, jnp.float64)
    options = {"num_groups": 4, "statistics": statistics, "order": order}
    y, new = compiled(**options)(x, running, mask=mask)
    pixels = valid_pixels(x, mask)
    expected = oracles.batch_channel_norm(pixels, running.mean, running.var, **options)
    assert tree_relative_error((new.mean, new.var), expected[1:]) < 1e-12
    # The channel part uses each sample's own valid region, whatever statistics the first part used.
    used = {
        "batch": (pixels.mean(0), pixels.var(0)),
        "estimate": expected[1:] if order == "update_first" else running[:2],
    }[statistics]
    for i, sample in enumerate(x):
        region = valid_pixels(sample[None], mask[i : i + 1])[None]
        alone = oracles.batch_channel_norm(region, *used, num_groups=4, order="normalize_first")
        assert relative_error(y[i][np.asarray(mask[i, ..., 0])], alone.y[0]) < 1e-11


@each_kind
def test_padding_does_not_leak_whatever_it_holds(statistics, order):
    """A batch without valid positions does not change the statistics either."""
    mask, running = unequal_masks(3, 4, 5), running_stats(2, 6)
    function = with_parameters(num_groups=2, statistics=statistics, order=order)
    x, values = jnp.where(mask, normal(1, 3, 4, 5, 6), 0), parameters(6, 2)
    dy = jnp.where(mask, normal(2, 3, 4, 5, 6), 0)

    def run(x):
        # Only the output at padding, and the gradient there, may be anything.
        y, (dx, *gradients), new = value_gradients_and_stats(
            function, (x, *values), dy, running, mask
        )
        return jnp.where(mask, y, 0), jnp.where(mask, dx, 0), gradients, new

    clean = run(x)
    chex.assert_tree_all_finite(clean)
    for junk in (jnp.inf, jnp.nan):
        chex.assert_trees_all_close(run(jnp.where(mask, x, junk)), clean, rtol=1e-6)

    y, gradients, new = value_gradients_and_stats(
        function, (x, *values), jnp.ones_like(x), running, jnp.zeros_like(mask)
    )
    chex.assert_trees_all_equal(new, running)
    chex.assert_tree_all_finite((y, gradients))


@each_kind
def test_one_bad_batch_does_not_stay_in_the_state(statistics, order):
    """The square of 3e19 overflows. The output is not finite; the channel's statistics stay."""
    x, running = normal(1, 2, 4, 4, 6), running_stats(2, 6)
    norm = compiled(num_groups=3, statistics=statistics, order=order)
    _, expected = norm(x, running)
    kept = expected._replace(
        mean=expected.mean.at[3].set(running.mean[3]), var=expected.var.at[3].set(running.var[3])
    )
    for bad in (3e19, jnp.inf, jnp.nan):
        y, new = norm(x.at[0, 1, 2, 3].set(bad), running)
        assert not jnp.isfinite(y[0, ..., 2:4]).all()
        chex.assert_trees_all_close(new, kept, rtol=1e-6)


def test_rate_may_be_a_schedule_of_the_count():
    """With rate 1 / (count + 1), running statistics are means over all batches."""
    batches = normal(1, 5, 2, 4, 4, 6)
    running = RunningStats.fresh(6)
    norm = compiled(num_groups=2, statistics="batch", rate=lambda count: 1 / (count + 1))
    for x in batches:
        _, running = norm(x, running)
    assert running.count == 5
    assert relative_error(running.mean, jnp.mean(batches, (0, 1, 2, 3))) < 1e-5
    assert relative_error(running.var, jnp.mean(jnp.var(batches, (1, 2, 3)), 0)) < 1e-5


def test_estimates_reach_the_true_moments():
    """In the published code the rate is a buffer of zeros, so its estimates never move."""
    true_mean, true_std = jnp.linspace(-3, 3, 6)[None, None, None], 2.0
    running = RunningStats.fresh(6)
    for seed in range(100):
        x = true_mean + true_std * normal(seed, 4, 8, 8, 6)
        _, running = compiled(num_groups=2, order="normalize_first")(x, running)
    np.testing.assert_allclose(running.mean, true_mean[0, 0, 0], atol=0.1)
    np.testing.assert_allclose(running.var, true_std**2, rtol=0.1)


def test_scale_per_group_is_that_scale_for_each_of_its_channels():
    x, dy, running = normal(1, 2, 5, 5, 12), normal(2, 2, 5, 5, 12), running_stats(3, 12)
    *values, scale, bias = parameters(12, 4)
    function = with_parameters(num_groups=4)
    y, (*gradients, d_scale, d_bias), new = value_gradients_and_stats(
        function, (x, *values, scale, bias), dy, running
    )
    repeated = (x, *values, jnp.repeat(scale, 3), jnp.repeat(bias, 3))
    expected_y, expected, expected_new = value_gradients_and_stats(function, repeated, dy, running)
    expected = [*expected[:3], *(g.reshape(4, 3).sum(1) for g in expected[3:])]
    actual = y, [*gradients, d_scale, d_bias], new
    assert tree_relative_error(actual, (expected_y, expected, expected_new)) < 1e-5


@pytest.mark.usefixtures("x64")
def test_normalize_first_is_the_same_however_the_batch_is_split():
    x, dy = (normal(seed, 8, 3, 4, 6, dtype=jnp.float64) for seed in (1, 2))
    values, running = parameters(6, 2, jnp.float64), running_stats(3, 6, jnp.float64)
    function = with_parameters(num_groups=2, order="normalize_first")
    y, (dx, *gradients), new = value_gradients_and_stats(function, (x, *values), dy, running)
    for count in (2, 8):
        parts = [
            value_gradients_and_stats(function, (part, *values), part_dy, running)
            for part, part_dy in zip(jnp.split(x, count), jnp.split(dy, count), strict=True)
        ]
        part_y, (part_dx, *part_gradients), part_new = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *parts
        )
        error = tree_relative_error((part_y.reshape(y.shape), part_dx.reshape(x.shape)), (y, dx))
        assert error < 1e-13
        summed = jax.tree.map(lambda g: jnp.sum(g, 0), part_gradients)
        averaged = jax.tree.map(lambda s: jnp.mean(s, 0), part_new)
        assert tree_relative_error((summed, averaged), (gradients, new)) < 1e-13


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("mode", "masked", "statistics", "order"),
    [
        ("shard_map", True, "batch", "update_first"),
        ("shard_map", True, "estimate", "update_first"),
        ("shard_map", False, "estimate", "normalize_first"),
        ("pmap", True, "estimate", "normalize_first"),
        ("pmap", False, "batch", "update_first"),
    ],
)
def test_eight_devices_equal_one(statistics, order, mode, masked, mesh8):
    """Gradients pass through the collectives; each device has its own number of valid pixels."""
    x, dy = (normal(seed, 16, 4, 5, 6, dtype=jnp.float64) for seed in (1, 2))
    x = x + jnp.arange(16.0).reshape(16, 1, 1, 1)
    mask = unequal_masks(16, 4, 5) if masked else jnp.ones((16, 4, 5, 1), bool)
    running = running_stats(3, 6, jnp.float64)

    def step(x, dy, mask, axis_name=None):
        def loss_fn(x):
            y, new = batch_channel_norm(
                x,
                running,
                num_groups=2,
                statistics=statistics,
                order=order,
                axis_name=axis_name,
                mask=mask if masked else None,
            )
            return jnp.sum(jnp.where(mask, y * dy, 0)), (jnp.where(mask, y, 0), new)

        dx, (y, new) = jax.grad(loss_fn, has_aux=True)(x)
        return y, dx, new

    expected = jax.jit(step)(x, dy, mask)
    sharded = functools.partial(step, axis_name="data")
    if mode == "shard_map":
        specs = {"in_specs": P("data"), "out_specs": (P("data"), P("data"), P())}
        actual = jax.jit(jax.shard_map(sharded, mesh=mesh8, **specs))(x, dy, mask)
    else:
        split = jax.tree.map(lambda a: a.reshape(8, 2, *a.shape[1:]), (x, dy, mask))
        y, dx, new = jax.pmap(sharded, axis_name="data", out_axes=(0, 0, None))(*split)
        actual = y.reshape(x.shape), dx.reshape(x.shape), new
    assert tree_relative_error(actual, expected) < 1e-10


def test_layers_of_one_shape_are_traced_and_lowered_once():
    """Otherwise tracing a deep network would take many times as long as with BatchNorm."""

    def functions(depth):
        def network(x):
            for _ in range(depth):
                x, _ = batch_channel_norm(x, RunningStats.fresh(8), num_groups=4)
            return jnp.sum(jnp.sin(x))

        program = jax.jit(jax.grad(network)).lower(normal(1, 2, 4, 4, 8)).as_text()
        return program.count("func.func private @_batch_channel_norm")

    assert functions(depth=3) == functions(depth=1) == 2
