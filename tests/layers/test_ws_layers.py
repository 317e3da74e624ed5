"""The WS layers are Flax's own layers applied to standardized kernels."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from oracles import normal, tree_relative_error, value_and_vjp

from wsbcn_flax import WSConv, WSConvTranspose, WSDense, standardize
from wsbcn_flax.ops import PRESETS

# layer, Flax's layer, output axis of the kernel, arguments, input shape
CASES = {
    "1d": (WSConv, nn.Conv, -1, {"kernel_size": (5,)}, (2, 9, 4)),
    "2d": (WSConv, nn.Conv, -1, {"kernel_size": (3, 3)}, (2, 7, 8, 4)),
    "3d": (WSConv, nn.Conv, -1, {"kernel_size": (2, 3, 2)}, (2, 4, 5, 6, 4)),
    "pointwise": (WSConv, nn.Conv, -1, {"kernel_size": (1, 1)}, (2, 7, 8, 4)),
    "strides": (WSConv, nn.Conv, -1, {"kernel_size": (3, 3), "strides": 2}, (2, 7, 8, 4)),
    "dilation": (WSConv, nn.Conv, -1, {"kernel_size": (3, 3), "kernel_dilation": 2}, (2, 9, 9, 4)),
    "groups": (
        WSConv,
        nn.Conv,
        -1,
        {"kernel_size": (3, 3), "feature_group_count": 2},
        (2, 7, 8, 4),
    ),
    "depthwise": (
        WSConv,
        nn.Conv,
        -1,
        {"kernel_size": (3, 3), "feature_group_count": 4},
        (2, 7, 8, 4),
    ),
    "no_bias": (WSConv, nn.Conv, -1, {"kernel_size": (3, 3), "use_bias": False}, (2, 7, 8, 4)),
    "no_batch_axis": (WSConv, nn.Conv, -1, {"kernel_size": (3, 3)}, (7, 8, 4)),
    "transpose": (
        WSConvTranspose,
        nn.ConvTranspose,
        -1,
        {"kernel_size": (3, 2), "strides": (2, 2)},
        (2, 5, 6, 4),
    ),
    "transpose_kernel": (
        WSConvTranspose,
        nn.ConvTranspose,
        -2,
        {"kernel_size": (3, 2), "strides": (2, 2), "transpose_kernel": True},
        (2, 5, 6, 4),
    ),
    "dense": (WSDense, nn.Dense, -1, {}, (2, 5, 4)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("case", "preset"),
    [*((case, "bcn") for case in CASES), ("2d", "nfnet"), ("transpose_kernel", "nfnet")],
)
def test_is_the_flax_layer_on_a_standardized_kernel(case, preset):
    """Parameters have equal names, shapes and initial values, so checkpoints fit either layer."""
    layer, flax_layer, out_axis, arguments, shape = CASES[case]
    x = normal(1, *shape, dtype=jnp.float64)
    options = {**arguments, "param_dtype": jnp.float64, "bias_init": nn.initializers.normal()}
    ours, flax = layer(8, **options, preset=preset), flax_layer(8, **options)
    params, our_params = (jax.jit(m.init)(jax.random.key(5), x)["params"] for m in (flax, ours))
    if not PRESETS[preset].learnable_gain:
        chex.assert_trees_all_equal(our_params, params)
    else:
        chex.assert_trees_all_equal(our_params["gain"], jnp.ones(8))
        params = {**params, "gain": normal(2, 8, dtype=jnp.float64)}

    def standardized(params, x):
        params = dict(params)
        params["kernel"] = standardize(
            params["kernel"], preset=preset, out_axis=out_axis, gain=params.pop("gain", None)
        )
        return flax.apply({"params": params}, x)

    apply = lambda params, x: ours.apply({"params": params}, x)  # noqa: E731
    dy = normal(3, *jax.eval_shape(apply, params, x).shape, dtype=jnp.float64)
    actual, expected = (value_and_vjp(f, (params, x), dy) for f in (apply, standardized))
    assert tree_relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("case", ["2d", "transpose", "transpose_kernel", "dense"])
@pytest.mark.parametrize("preset", PRESETS)
def test_gain_is_a_parameter_where_the_preset_learns_it(case, preset):
    layer, _, _, arguments, shape = CASES[case]
    init = layer(8, **arguments, preset=preset).init
    params = jax.eval_shape(init, jax.random.key(0), jnp.ones(shape))["params"]
    learns = preset in ("nfnet", "wn", "cwn")
    added = {"gain"} if learns else set()
    added |= {"constant_gain", "constant_shift"} if preset == "aws" else set()
    assert set(params) == {"kernel", "bias"} | added
    assert all(params[name].shape == (8,) for name in added)


def test_the_kernel_is_standardized_before_it_is_cast():
    """If cast to bfloat16 first, a kernel of mean 1 and spread 1e-3 would be constant."""
    x, kernel = normal(1, 2, 6, 6, 4), 1 + 1e-3 * normal(2, 3, 3, 4, 8)
    conv = WSConv(8, (3, 3), use_bias=False, dtype=jnp.bfloat16)
    y = conv.apply({"params": {"kernel": kernel}}, x)
    expected = nn.Conv(8, (3, 3), use_bias=False).apply(
        {"params": {"kernel": standardize(kernel)}}, x
    )
    assert y.dtype == jnp.bfloat16
    assert tree_relative_error(y, expected) < 0.02


def test_output_does_not_depend_on_scale_and_mean_of_the_kernel():
    """The invariance that gives weight standardization its name."""
    x = normal(1, 2, 6, 6, 4)
    conv = WSConv(8, (3, 3), preset="bit")
    params = conv.init(jax.random.key(0), x)["params"]
    moved = {**params, "kernel": 3 * params["kernel"] + 0.5}
    actual, expected = (conv.apply({"params": p}, x) for p in (moved, params))
    assert tree_relative_error(actual, expected) < 1e-5
