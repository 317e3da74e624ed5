"""Weight standardization of all of ResNet-50's kernels, against one elementwise pass over them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console

from experiments._bench.layers import Shape, normal_arrays
from experiments._bench.options import TimedOptions, check_writable, save
from experiments._bench.printing import machine_facts, passes_table, progress_bar
from experiments._bench.timing import Call, Key, interleaved_seconds, median_and_spread, ratio
from wsbcn_flax import standardize


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization(TimedOptions):
    """Weight standardization of ResNet-50's kernels, against one elementwise pass over them."""

    repeats: int = 20


def run_weight_standardization(
    config: WeightStandardization, console: Console
) -> list[dict[str, Any]]:
    """Measures, prints and returns the rows of ``ws``, writing them where asked to."""
    check_writable(config.json)
    calls = weight_calls(resnet50_kernels())
    with progress_bar(len(calls) + config.rounds) as advance:
        seconds = interleaved_seconds(
            calls, rounds=config.rounds, on_warm=advance, on_round=advance
        )
    rows = weight_rows(seconds)
    console.print(machine_facts())
    title = "Time over one elementwise pass's, ResNet-50"
    console.print(passes_table(rows, title=title, labels=("form",)))
    save(config.json, rows)
    return rows


def resnet50_kernels() -> list[Shape]:
    """The shapes, HWIO, of the 53 convolutions of a ResNet-50, stem and projections included."""
    return [(7, 7, 3, 64), *_bottleneck_kernels(stage_sizes=(3, 4, 6, 3))]


def _bottleneck_kernels(stage_sizes: tuple[int, ...]) -> Iterator[Shape]:
    channels = 64
    for stage, blocks in enumerate(stage_sizes):
        width = 64 * 2**stage
        for block in range(blocks):
            yield from ((1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width))
            if block == 0:
                yield (1, 1, channels, 4 * width)
            channels = 4 * width


def standardize_by_autodiff(kernel: jax.Array) -> jax.Array:
    """The formula of ``standardize``'s default preset, which JAX is left to differentiate."""
    axes = tuple(range(kernel.ndim - 1))
    mean = jnp.mean(kernel, axes, keepdims=True)
    var = jnp.var(kernel, axes, ddof=1, keepdims=True)
    return (kernel - mean) * lax.rsqrt(var + 1e-5)


def weight_normalize(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """The formula of ``flax.linen.WeightNorm``, which JAX differentiates: [H, W, I, O], [O]."""
    axes = tuple(range(kernel.ndim - 1))
    norm = lax.rsqrt(jnp.sum(kernel * kernel, axes, keepdims=True) + 1e-12)
    return kernel * norm * jnp.expand_dims(scale, axes)


def weight_calls(shapes: list[Shape]) -> dict[Key, Call]:
    """One elementwise pass over all kernels, and each form of reparameterizing them."""
    kernels, cotangents = _kernels_and_cotangents(shapes)
    scales = [jnp.ones(shape[-1]) for shape in shapes]
    forms: dict[str, tuple[Callable[..., jax.Array], tuple[list[jax.Array], ...]]] = {
        "closed_form": (standardize, (kernels,)),
        "autodiff": (standardize_by_autodiff, (kernels,)),
        "weight_norm": (weight_normalize, (kernels, scales)),
    }
    calls: dict[Key, Call] = {
        ("elementwise", "forward"): functools.partial(
            _map_jitted(lambda kernel: 2 * kernel), kernels
        )
    }
    for name, (transform, arguments) in forms.items():
        calls[name, "forward"] = functools.partial(_map_jitted(transform), *arguments)
        calls[name, "forward_backward"] = _with_gradients(transform, cotangents, *arguments)
    return calls


def closed_form_call(shapes: list[Shape]) -> Call:
    """Weight standardization of kernels with its gradient: a training step's, without the step."""
    kernels, cotangents = _kernels_and_cotangents(shapes)
    return _with_gradients(standardize, cotangents, kernels)


def _kernels_and_cotangents(shapes: list[Shape]) -> tuple[list[jax.Array], list[jax.Array]]:
    generator = np.random.default_rng(0)
    kernels, cotangents = (normal_arrays(generator, *shapes) for _ in range(2))
    return [*map(jnp.asarray, kernels)], [*map(jnp.asarray, cotangents)]


def _with_gradients(
    transform: Callable[..., jax.Array],
    cotangents: list[jax.Array],
    *arguments: list[jax.Array],
) -> Call:
    def pull_back(cotangent, *arguments):
        output, pull_back = jax.vjp(transform, *arguments)
        return output, *pull_back(cotangent)

    return functools.partial(_map_jitted(pull_back), cotangents, *arguments)


def _map_jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled call for all kernels, so that dispatch is paid once."""
    return jax.jit(lambda *lists: [function(*each) for each in zip(*lists, strict=True)])


def weight_rows(seconds: Mapping[Key, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each form of weight standardization and pass, ready for JSON."""
    return [
        {
            "form": name,
            "pass": which,
            "ratio_to_elementwise": ratio(times, seconds["elementwise", "forward"]),
            **median_and_spread(times),
        }
        for (name, which), times in seconds.items()
    ]
