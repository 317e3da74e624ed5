"""Normalization layers alone, in training, against flax.linen.BatchNorm and PyTorch's."""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich
from rich.table import Table

from experiments._baselines import NaiveBatchChannelNorm
from experiments._tables import Column, machine_facts, table
from experiments.bench import _timing as timing
from experiments.bench._timing import PASSES, Call, Key, Shape
from wsbcn_flax import BatchChannelNorm

_REFERENCES = ("batch_norm", "naive_bcn", "torch_batch_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers(timing.Measurement):
    """Times normalization layers in training, against flax.linen.BatchNorm.

    Attributes:
        shapes: Shapes of the float32 activations: batch, height, width and channels.
        num_groups: Number of groups of group and batch-channel normalization; divides all channels.
        against: "torch" adds PyTorch's layers, each in the faster of its two memory formats.
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
        torch = timing.load_torch() if self.against == "torch" else None
        norms = normalizations(self.num_groups)
        measured, formats, rows = [], [], []
        for shape in self.shapes:
            calls = layer_calls(norms, shape)
            if torch is not None:
                calls |= torch.layer_calls(self.num_groups, timing.normal_arrays(shape, shape))
            of_shape = timing.shape_text(shape)
            timed = timing.interleaved_seconds(calls, f"measure {of_shape}", rounds=self.rounds)
            seconds, chosen = timing.keep_faster_format(timed)
            measured.append(seconds)
            formats += [f"{of_shape} {' '.join(key)}: {name}" for key, name in chosen.items()]
            rows += layer_rows(shape, seconds)
        print(machine_facts())
        if torch is not None:
            print(f"{torch.facts()}. Its faster formats: {', '.join(formats)}.")
        title, key = "Time over flax BatchNorm's, in training", "ratio_to_batchnorm"
        rich.print(timing.passes_table(title, rows, "shape", "norm", key=key))
        rich.print(means_table(measured))
        return rows


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
    """Makes a training call of every layer: forward, and with gradients of parameters and input.

    All layers see the same float32 input and cotangent, and return what training needs of them:
    the output, the gradients and the new running statistics. Beside them stands one elementwise
    pass, which reads x and writes an array of its size. A normalization must make at least one and
    a half of these forward (x twice, y), and four in all (also x and the cotangent twice, dx).
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


def layer_rows(shape: Shape, seconds: Mapping[Key, np.ndarray]) -> list[dict[str, Any]]:
    """Returns a row for each layer and pass at one shape, as JSON values."""
    return timing.ratio_rows(
        seconds,
        ("norm", "pass"),
        "ratio_to_batchnorm",
        lambda key: ("batch_norm", key[1]),
        shape=list(shape),
    )


def means_table(measured: Sequence[Mapping[Key, np.ndarray]]) -> Table:
    """Makes a table of geometric means over shapes of each layer's ratios to the references."""
    rows: dict[str, dict[str, Any]] = {
        name: {"norm": name} for name, which in measured[0] if which == "forward_backward"
    }
    columns: dict[str, Column] = {"norm": ("norm", str)}
    for reference in (name for name in _REFERENCES if name in rows):
        for which, heading in PASSES.items():
            key = f"{reference} {which}"
            columns[key] = (f"{heading}\n/ {reference.replace('_', ' ')}", "{:.2f}".format)
            for name, row in rows.items():
                ratios = (timing.ratio(x[name, which], x[reference, which]) for x in measured)
                row[key] = statistics.geometric_mean(ratios)
    return table("Geometric means over shapes", list(rows.values()), columns)
