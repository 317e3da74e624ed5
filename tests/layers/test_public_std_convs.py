"""docs/stdconv.md: the preset of each public layer computes what the layer's source computes.

The formulas use the same operations as their sources; only names are copied from there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import normal, relative_error

from wsbcn_flax import WSConv, standardize
from wsbcn_flax.ops import StandardizationRule

FAN_IN = (0, 1, 2)


def big_vision_bit(w):
    """This is also the layer of vision_transformer and octo."""
    w = w - jnp.mean(w, FAN_IN)
    return w / (jnp.std(w, FAN_IN) + 1e-5)


def big_vision_bit_paper(w):
    w = w - jnp.mean(w, FAN_IN, keepdims=True)
    return w / jnp.sqrt(jnp.mean(jnp.square(w), FAN_IN, keepdims=True) + 1e-10)


def timm(w, eps=1e-6):
    """Computes PyTorch's batch_norm in training mode of the kernel as [1, out, fan-in]."""
    mean, var = jnp.mean(w, FAN_IN), jnp.var(w, FAN_IN)
    return (w - mean) * lax.rsqrt(var + eps)


def nfnets(w, gain):
    mean, var = jnp.mean(w, FAN_IN), jnp.var(w, FAN_IN)
    scale = lax.rsqrt(jnp.maximum(var * np.prod(w.shape[:-1]), 1e-4)) * gain
    return w * scale - mean * scale


TIMM_BIT = StandardizationRule(denominator="sqrt_var_plus_eps", epsilon=1e-8)
LAYERS = {
    "big_vision bit": ("official_tf", big_vision_bit),
    "big_vision bit_paper": ("bit", big_vision_bit_paper),
    "timm": ("timm", timm),
    "timm BiT": (TIMM_BIT, lambda w: timm(w, 1e-8)),
    "NFNets": ("nfnet", nfnets),
}
TOLERANCE = {"float64": 2e-13, "float32": 2e-6}


@pytest.fixture(autouse=True)
def _broadcasting():
    """The sources rely on broadcasting between ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def layers(preset, formula, dtype):
    """Makes our layer, a plain layer whose ``param`` applies the formula, parameters and input."""

    class StdConv(nn.Conv):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            if name != "kernel":
                return value
            return formula(value, params["gain"]) if "gain" in params else formula(value)

    options = {"strides": 2, "param_dtype": dtype, "name": "conv"}
    ours = WSConv(12, (3, 3), preset=preset, **options)
    x = normal(0, 2, 9, 9, 8, dtype=dtype)
    params = dict(ours.init(jax.random.key(0), x)["params"])
    params["kernel"] = params["kernel"] + 0.02  # Makes the mean differ from zero.
    if "gain" in params:
        params["gain"] = 1 + 0.1 * normal(1, 12, dtype=dtype)
    return ours, StdConv(12, (3, 3), **options), params, x


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_the_public_one(name, dtype):
    ours, theirs, params, x = layers(*LAYERS[name], dtype)
    plain = {key: value for key, value in params.items() if key != "gain"}
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(
        jnp.shape, nn.Conv(12, (3, 3)).init(jax.random.key(0), x)["params"]
    )
    actual, expected = ours.apply({"params": params}, x), theirs.apply({"params": plain}, x)
    assert expected.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.usefixtures("x64")
def test_other_presets_are_not_the_public_layer():
    """Every other preset differs by more than the tolerance above."""
    kernel = 0.02 + 0.1 * normal(0, 3, 3, 8, 12, dtype=jnp.float64)
    for name, (preset, formula) in LAYERS.items():
        expected = formula(kernel, 1.0) if name == "NFNets" else formula(kernel)
        for other in ("bcn", "official", "official_tf", "bit", "timm", "nfnet"):
            if other != preset:
                error = relative_error(standardize(kernel, preset=other), expected)
                assert error > TOLERANCE["float64"], (name, other)


def test_the_gradient_is_finite_where_the_public_one_is_not():
    kernel = jnp.ones((3, 3, 8, 12))
    theirs = jax.grad(lambda w: big_vision_bit(w).sum())(kernel)
    ours = jax.grad(lambda w: standardize(w, preset="official_tf").sum())(kernel)
    assert jnp.isnan(theirs).all()
    assert jnp.isfinite(ours).all()
