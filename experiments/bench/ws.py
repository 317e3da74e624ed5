"""Weight standardization of all of ResNet-50's kernels, against one elementwise pass over them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import rich
from jax import lax

from experiments._tables import machine_facts
from experiments.bench import _timing as timing
from experiments.bench._timing import Call, Key, Shape
from wsbcn_flax import standardize


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization(timing.Measurement):
    """Times weight standardization of ResNet-50's kernels, against one elementwise pass."""

    repeats: int = 20

    def measure(self) -> list[dict[str, Any]]:
        """Measures, prints a table, and returns a row for each form and pass."""
        seconds = timing.interleaved_seconds(weight_calls(resnet50_kernels()), rounds=self.rounds)
        key, reference = "ratio_to_elementwise", ("elementwise", "forward")
        rows = timing.ratio_rows(seconds, ("form", "pass"), key, lambda _: reference)
        print(machine_facts())
        title = "Time over one elementwise pass's, ResNet-50"
        rich.print(timing.passes_table(title, rows, "form", key=key))
        return rows


def resnet50_kernels() -> list[Shape]:
    """Returns the shapes, HWIO, of ResNet-50's 53 kernels, stem and projections included."""
    shapes, channels = [(7, 7, 3, 64)], 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            shapes += [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            if block == 0:
                shapes.append((1, 1, channels, 4 * width))
            channels = 4 * width
    return shapes


def standardize_by_autodiff(kernel: jax.Array) -> jax.Array:
    """Computes ``standardize``'s default preset, which JAX is left to differentiate."""
    axes = tuple(range(kernel.ndim - 1))
    mean = jnp.mean(kernel, axes, keepdims=True)
    var = jnp.var(kernel, axes, ddof=1, keepdims=True)
    return (kernel - mean) * lax.rsqrt(var + 1e-5)


def weight_normalize(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """Computes ``flax.linen.WeightNorm``, which JAX differentiates: [H, W, I, O], [O]."""
    axes = tuple(range(kernel.ndim - 1))
    norm = lax.rsqrt(jnp.sum(kernel * kernel, axes, keepdims=True) + 1e-12)
    return kernel * norm * jnp.expand_dims(scale, axes)


def weight_calls(shapes: list[Shape]) -> dict[Key, Call]:
    """Makes one elementwise pass over all kernels, and each form of reparameterizing them.

    One compiled call takes all kernels, so that dispatch is paid once.
    """
    arrays = [jnp.asarray(array) for array in timing.normal_arrays(*shapes, *shapes)]
    kernels, cotangents = arrays[: len(shapes)], arrays[len(shapes) :]
    scales = [jnp.ones(shape[-1]) for shape in shapes]
    calls = timing.elementwise(kernels)
    for name, transform, *arguments in (
        ("closed_form", standardize, kernels),
        ("autodiff", standardize_by_autodiff, kernels),
        ("weight_norm", weight_normalize, kernels, scales),
    ):

        def apply(_, *lists, transform=transform):
            return [transform(*each) for each in zip(*lists, strict=True)], None

        calls |= timing.both_passes(name, apply, None, cotangents, *arguments)
    return calls
