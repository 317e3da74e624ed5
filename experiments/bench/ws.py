"""Measures weight standardization of ResNet-50's kernels, relative to an elementwise pass."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.bench import _timing as timing
from experiments.bench._timing import ELEMENTWISE, Call, Key, Shape, figures
from wsbcn_flax import standardize
from wsbcn_flax.models import ResNet50


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization(timing.Measurement):
    """Times weight standardization of ResNet-50's kernels, relative to an elementwise pass."""

    repeats: int = 20

    def measure(self) -> list[dict[str, Any]]:
        """Measures, prints a table, and returns a row for each form and pass."""
        seconds = timing.interleaved_seconds(weight_calls(resnet50_kernels()), rounds=self.rounds)
        rows = [
            {"form": form, "pass": which, **figures(times, elementwise=seconds[ELEMENTWISE])}
            for (form, which), times in seconds.items()
        ]
        timing.print_rows("Weight standardization of ResNet-50's kernels", rows)
        return rows


def resnet50_kernels() -> list[Shape]:
    """Returns the shapes, HWIO, of ResNet-50's 53 kernels, stem and projections included."""
    init = functools.partial(ResNet50().init, train=False)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return kernel_shapes(jax.eval_shape(init, jax.random.key(0), images)["params"])


def kernel_shapes(params: Any) -> list[Shape]:
    """Returns the shapes, HWIO, of all convolution kernels."""
    return [array.shape for array in jax.tree.leaves(params) if array.ndim == 4]


def weight_calls(shapes: list[Shape]) -> dict[Key, Call]:
    """Makes one elementwise pass over all kernels, and each form of standardizing them.

    One compiled call takes all kernels, so that dispatch is paid once.
    """
    arrays = [jnp.asarray(array) for array in timing.normal_arrays(*shapes, *shapes)]
    kernels, cotangents = arrays[: len(shapes)], arrays[len(shapes) :]
    calls = timing.elementwise(kernels)
    for name, form in (
        ("closed_form", standardize),
        ("autodiff", standardize_by_autodiff),
        ("weight_norm", functools.partial(standardize, preset="wn")),
    ):

        def apply(_, kernels, form=form):
            return jax.tree.map(form, kernels), None

        calls |= timing.both_passes(name, apply, None, cotangents, kernels)
    return calls


def standardize_by_autodiff(kernel: jax.Array) -> jax.Array:
    """Computes ``standardize``'s default preset, and leaves derivatives to JAX."""
    axes = tuple(range(kernel.ndim - 1))
    mean = jnp.mean(kernel, axes, keepdims=True)
    var = jnp.var(kernel, axes, ddof=1, keepdims=True)
    return (kernel - mean) * lax.rsqrt(var + 1e-5)
