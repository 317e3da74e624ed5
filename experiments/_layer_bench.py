"""What ``experiments.bench`` compares, and how: interleaved, as ratios within a round."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments._baselines import NaiveBatchChannelNorm
from wsbcn_flax import BatchChannelNorm, standardize

Shape = tuple[int, int, int, int]
Pass = Literal["forward", "forward_backward"]
Key = tuple[str, Pass]
Call = Callable[[], Any]

PASSES: tuple[Pass, ...] = ("forward", "forward_backward")


def normalizations(num_groups: int) -> dict[str, nn.Module]:
    """The layers compared, in training mode, by the name their rows carry."""
    bcn = functools.partial(BatchChannelNorm, num_groups, use_running_average=False)
    return {
        "batch_norm": nn.BatchNorm(use_running_average=False, momentum=0.9),
        "group_norm": nn.GroupNorm(num_groups),
        "naive_bcn": NaiveBatchChannelNorm(num_groups),
        "bcn": bcn(order="normalize_first"),
        "bcn_update_first": bcn(order="update_first"),
        "bcn_batch": bcn(statistics="batch"),
    }


def layer_calls(norms: Mapping[str, nn.Module], shape: Shape) -> dict[Key, Call]:
    """One training call of every layer, forward alone and with the gradient of params and input.

    All layers see the same float32 input and cotangent, and return what training needs of them:
    the output, the new running statistics and, in the second pass, the gradients.
    """
    x, cotangent = _normal(np.random.default_rng(0), shape, shape)
    calls: dict[Key, Call] = {}
    for name, norm in norms.items():
        variables = norm.init(jax.random.key(0), x)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        forward, forward_backward = _layer_passes(norm)
        calls[name, "forward"] = functools.partial(forward, params, batch_stats, x)
        calls[name, "forward_backward"] = functools.partial(
            forward_backward, params, batch_stats, x, cotangent
        )
    return calls


def _layer_passes(norm: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(params, batch_stats, x):
        variables = {"params": params, "batch_stats": batch_stats}
        return norm.apply(variables, x, mutable=["batch_stats"])

    def forward_backward(params, batch_stats, x, cotangent):
        y, pull_back, updates = jax.vjp(
            lambda params, x: forward(params, batch_stats, x), params, x, has_aux=True
        )
        return y, pull_back(cotangent), updates

    return jax.jit(forward), jax.jit(forward_backward)


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


def weight_calls(shapes: list[Shape]) -> dict[Key, Call]:
    """Weight standardization of all kernels, closed form and autodiff, and one elementwise pass."""
    generator = np.random.default_rng(0)
    kernels, cotangents = _normal(generator, *shapes), _normal(generator, *shapes)

    calls: dict[Key, Call] = {
        ("elementwise", "forward"): functools.partial(
            _map_jitted(lambda kernel: 2 * kernel), kernels
        )
    }
    for name, transform in {
        "closed_form": standardize,
        "autodiff": standardize_by_autodiff,
    }.items():
        calls[name, "forward"] = functools.partial(_map_jitted(transform), kernels)
        calls[name, "forward_backward"] = functools.partial(
            _map_jitted(functools.partial(_with_gradient, transform)), kernels, cotangents
        )
    return calls


def _with_gradient(transform, kernel, cotangent):
    output, pull_back = jax.vjp(transform, kernel)
    return output, *pull_back(cotangent)


def _map_jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled call for all kernels, so that dispatch is paid once."""
    return jax.jit(lambda *lists: [function(*each) for each in zip(*lists, strict=True)])


def _normal(generator: np.random.Generator, *shapes: Shape) -> list[jax.Array]:
    return [jnp.asarray(generator.standard_normal(shape, np.float32)) for shape in shapes]


def interleaved_seconds(
    calls: Mapping[Key, Call],
    *,
    rounds: int,
    on_round: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, np.ndarray]:
    """Times every call once per round, so that what disturbs the machine disturbs them all alike.

    Each call is first compiled and run once more. The order changes from round to round, see
    ``balanced_order``, and a call's time ends when all of its results are there.

    Args:
        calls: the functions of no arguments to compare.
        rounds: how often each is timed.
        on_round: is called after each round, outside of any measurement.
        clock: gives the time in seconds.

    Returns:
        The seconds of every call, [rounds].
    """
    for call in calls.values():
        for _ in range(2):
            jax.block_until_ready(call())

    seconds = {key: np.empty(rounds) for key in calls}
    keys = list(calls)
    for index in range(rounds):
        for key in (keys[position] for position in balanced_order(len(keys), index)):
            begin = clock()
            result = jax.block_until_ready(calls[key]())
            seconds[key][index] = clock() - begin
            del result  # Freed here, outside of the time taken.
        on_round()
    return seconds


def balanced_order(count: int, index: int) -> list[int]:
    """The order in which to time ``count`` calls in round ``index``: rotations of a zigzag.

    Who runs before a call changes its time, by the caches and the memory it leaves behind: a tenth
    and more here. In ``count`` rounds (twice as many if that is odd) every call stands at every
    place equally often, and follows every other equally often.

    Example:
        >>> [balanced_order(4, index) for index in range(4)]
        [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]

    References:
        Williams, Experimental designs balanced for the estimation of residual effects of
        treatments, 1949.
    """
    zigzag = ((step + 1) // 2 * (1 if step % 2 else -1) for step in range(count))
    direction = -1 if index // count % 2 else 1
    return [(index + direction * offset) % count for offset in zigzag]


def ratio(seconds: np.ndarray, reference: np.ndarray) -> float:
    """The median over rounds of one call's time over another's in the same round."""
    return float(np.median(seconds / reference))


def geometric_mean_ratio(
    measured: list[dict[Key, np.ndarray]], name: str, reference: str, which: Pass
) -> float:
    """The geometric mean, over shapes, of ``ratio`` between two layers in one pass."""
    logs = [math.log(ratio(each[name, which], each[reference, which])) for each in measured]
    return math.exp(sum(logs) / len(logs))


def median_and_spread(seconds: np.ndarray) -> dict[str, float]:
    """The median in milliseconds, and the interquartile range as a fraction of the median."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return {"median_ms": float(median) * 1e3, "spread": float((high - low) / median)}


def layer_rows(shape: Shape, seconds: Mapping[Key, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each layer and pass at one shape, ready for JSON."""
    return [
        {
            "shape": list(shape),
            "norm": name,
            "pass": which,
            "ratio_to_batchnorm": ratio(times, seconds["batch_norm", which]),
            **median_and_spread(times),
        }
        for (name, which), times in seconds.items()
    ]


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
