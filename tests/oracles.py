"""Oracles for tests: formulas of the papers in plain numpy or autodiff."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Weight standardization: [fan-in, out] -> [fan-in, out], for numpy and for jax.numpy (autodiff).
STANDARDIZED: dict[str, Callable] = {
    "bcn": lambda w, xp=np: (w - w.mean(0)) / xp.sqrt(xp.var(w, axis=0, ddof=1) + 1e-5),
    "official": lambda w, xp=np: (w - w.mean(0)) / (xp.std(w, axis=0, ddof=1) + 1e-5),
    "official_tf": lambda w, xp=np: (w - w.mean(0)) / (xp.std(w, axis=0) + 1e-5),
    "bit": lambda w, xp=np: (w - w.mean(0)) / xp.sqrt(xp.var(w, axis=0) + 1e-10),
    "timm": lambda w, xp=np: (w - w.mean(0)) / xp.sqrt(xp.var(w, axis=0) + 1e-6),
    "aws": lambda w, xp=np: (w - w.mean(0)) / xp.sqrt(xp.var(w, axis=0, ddof=1) + 1e-5),
    "nfnet": lambda w, xp=np: (
        (w - w.mean(0)) / xp.sqrt(xp.maximum(xp.var(w, axis=0) * len(w), 1e-4))
    ),
    "wn": lambda w, xp=np: w / xp.sqrt((w * w).sum(0)),
    "cwn": lambda w, xp=np: (w - w.mean(0)) / xp.sqrt(((w - w.mean(0)) ** 2).sum(0)),
}


class Bcn(NamedTuple):
    """Output and running statistics of batch-channel normalization, in float64."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def batch_channel_norm(
    x,
    mean,
    var,
    *,
    num_groups,
    statistics="estimate",
    order="update_first",
    rate=0.1,
    epsilon=1e-5,
    affine=(1.0, 0.0, 1.0, 0.0),
) -> Bcn:
    """Computes the definition step by step; the last two entries of ``affine`` are [C]."""
    x, mean, var = (np.asarray(a, np.float64) for a in (x, mean, var))
    batch_scale, batch_bias, channel_scale, channel_bias = affine
    over = tuple(range(x.ndim - 1))
    about = x.mean(over) if statistics == "batch" else mean
    batch_mean, batch_var = x.mean(over), ((x - about) ** 2).mean(over)
    new_mean, new_var = mean + rate * (batch_mean - mean), var + rate * (batch_var - var)
    used = {
        ("batch", order): (batch_mean, batch_var),
        ("estimate", "update_first"): (new_mean, new_var),
        ("estimate", "normalize_first"): (mean, var),
    }[statistics, order]
    y = batch_scale * (x - used[0]) / np.sqrt(used[1] + epsilon) + batch_bias
    grouped = y.reshape(len(x), -1, num_groups, x.shape[-1] // num_groups)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    z = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + epsilon)
    return Bcn(channel_scale * z.reshape(x.shape) + channel_bias, new_mean, new_var)


def relative_error(actual, expected) -> float:
    """Returns the largest error divided by the largest expected value; NaN counts as infinite."""
    actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    return np.inf if np.isnan(error) else float(error)


def tree_relative_error(actual, expected) -> float:
    """Returns the largest ``relative_error`` over the leaves of two trees of one structure."""
    # Python's max would pass over NaN.
    return float(np.max(jax.tree.leaves(jax.tree.map(relative_error, actual, expected))))


def relative_difference(one, other) -> float:
    """Returns the largest max |a - b| / max |a| over all arrays; both may be all zeros."""
    scaled = jax.tree.map(lambda a, b: np.abs(a - b).max() / max(np.abs(a).max(), 1e-6), one, other)
    return float(np.max(jax.tree.leaves(scaled)))


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    """Draws standard normal numbers that do not depend on the default dtype."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.partial(jax.jit, static_argnums=0)
def value_and_vjp(function: Callable, primals: tuple, cotangent) -> tuple:
    """Returns the function's value and the pulled-back cotangent, in one compiled program."""
    value, vjp = jax.vjp(function, *primals)
    return value, vjp(cotangent)
