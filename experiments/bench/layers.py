"""Measures normalization layers, PyTorch's too, in training, relative to linen.BatchNorm."""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments._baselines import NaiveBatchChannelNorm
from experiments.bench import _timing as timing
from experiments.bench._timing import ELEMENTWISE, Call, Key, Shape, Times, figures
from wsbcn_flax import BatchChannelNorm

_RATIOS = ("ratio_to_batchnorm", "ratio_to_naive", "ratio_to_minimum")
_WRITTEN = ("norm", "pass", "ratio_to_batchnorm", "median_ms", "spread")
# Minimum memory traffic of a normalization, in elementwise passes, which read and write one array.
# Forward reads x twice and writes y; backward reads x and the cotangent twice and writes dx.
_MINIMUM = {"forward": 1.5, "forward_backward": 4.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers(timing.Measurement):
    """Times normalization layers in training, relative to flax.linen.BatchNorm.

    Attributes:
        shapes: Shapes of the float32 activations: batch, height, width and channels.
        num_groups: Number of groups of group and batch-channel normalization; divides all channels.
        against: "torch" adds PyTorch's layers, in both of its memory formats.
    """

    shapes: tuple[Shape, ...] = (
        (2, 56, 56, 256),
        (8, 32, 32, 64),
        (2, 14, 14, 1024),
        (64, 14, 14, 32),
    )
    num_groups: int = 32
    against: Literal["torch"] | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.shapes:
            raise ValueError("shapes must name at least one shape, for example 2 56 56 256.")
        for shape in self.shapes:
            if min(shape) < 1 or self.num_groups < 1 or shape[-1] % self.num_groups:
                raise ValueError(
                    "shapes must be positive, with channels that num_groups divides, received "
                    f"{shape} with num_groups={self.num_groups}."
                )

    def measure(self) -> list[dict[str, Any]]:
        """Measures, prints tables, and returns a row for each shape, layer and pass."""
        torch = timing.load_torch() if self.against else None
        tables = []
        for shape in self.shapes:
            calls = layer_calls(normalizations(self.num_groups), shape)
            if torch is not None:
                calls |= torch.layer_calls(self.num_groups, shape)
            seconds = timing.interleaved_seconds(calls, rounds=self.rounds)
            tables.append(layer_rows(seconds))
            timing.print_rows("Training at " + "x".join(map(str, shape)), tables[-1])
        timing.print_rows("Geometric means over shapes", mean_rows(tables))
        return [
            {"shape": list(shape)} | {key: row[key] for key in _WRITTEN}
            for shape, rows in zip(self.shapes, tables, strict=True)
            for row in rows
        ]


def normalizations(num_groups: int) -> dict[str, nn.Module]:
    """Returns the layers compared, in training mode, by the names of their rows."""
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
    """Makes training calls of every layer: forward, and with gradients of parameters and input.

    All layers receive the same float32 input and cotangent. They return the output, the gradients
    and the new running statistics. One elementwise pass over x is added.
    """
    x, cotangent = map(jnp.asarray, timing.normal_arrays(shape, shape))
    calls = timing.elementwise(x)
    for name, norm in norms.items():

        def apply(batch_stats, params, x, norm=norm):
            variables = {"params": params, "batch_stats": batch_stats}
            return norm.apply(variables, x, mutable=["batch_stats"])

        variables = norm.init(jax.random.key(0), x)
        averages = variables.get("batch_stats", {})
        calls |= timing.both_passes(name, apply, averages, cotangent, variables["params"], x)
    return calls


def layer_rows(seconds: Times) -> list[dict[str, Any]]:
    """Returns a row for each layer and pass at one shape, with ratios to all references."""
    return [
        {
            "norm": norm,
            "pass": which,
            **figures(
                times,
                batchnorm=seconds["batch_norm", which],
                naive=seconds["naive_bcn", which],
                minimum=_MINIMUM[which] * seconds[ELEMENTWISE],
            ),
        }
        for (norm, which), times in seconds.items()
    ]


def mean_rows(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns geometric means of the layers' ratios over shapes, each of which has a table."""
    return [
        {"norm": rows[0]["norm"], "pass": rows[0]["pass"]}
        | {key: statistics.geometric_mean(row[key] for row in rows) for key in _RATIOS}
        for rows in zip(*tables, strict=True)
    ]
