"""Normalization layers alone, in training, against flax.linen.BatchNorm and PyTorch's."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments._baselines import NaiveBatchChannelNorm
from experiments._bench.arrays import Shape, normal_arrays
from experiments._bench.options import TimedOptions, check_writable, save
from experiments._bench.printing import (
    HEADINGS,
    machine_facts,
    passes_table,
    plain_table,
    progress_bar,
)
from experiments._bench.timing import (
    PASSES,
    Call,
    Key,
    geometric_mean_ratio,
    interleaved_seconds,
    median_and_spread,
    ratio,
)
from experiments._bench.torch_extra import check_torch, keep_faster_format, torch_facts
from wsbcn_flax import BatchChannelNorm

ELEMENTWISE = "elementwise"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers(TimedOptions):
    """Normalization layers in training, against flax.linen.BatchNorm.

    Attributes:
        shapes: of the float32 activations: batch, height, width and channels, four numbers each.
        num_groups: groups of the group and batch-channel normalizations; divides all channels.
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


def run_layers(config: Layers, console: Console) -> list[dict[str, Any]]:
    """Measures, prints and returns the rows of ``layers``, writing them where asked to.

    Raises:
        ImportError: if PyTorch is asked for and not installed; names the extra.
        OSError: if the file cannot be written.
    """
    check_writable(config.json)
    if config.against == "torch":
        check_torch()
    norms = normalizations(config.num_groups)
    measured, formats = [], []
    with progress_bar(len(config.shapes) * config.rounds) as advance:
        for shape in config.shapes:
            calls = layer_calls(norms, shape)
            if config.against == "torch":
                calls |= _torch_calls(config.num_groups, shape)
            seconds = interleaved_seconds(calls, rounds=config.rounds, on_round=advance)
            seconds, chosen = keep_faster_format(seconds)
            measured.append(seconds)
            formats.append(chosen)
    rows = [
        row
        for shape, seconds in zip(config.shapes, measured, strict=True)
        for row in layer_rows(shape, seconds)
    ]
    console.print(machine_facts())
    if config.against == "torch":
        console.print(torch_facts())
        for shape, chosen in zip(config.shapes, formats, strict=True):
            faster = ", ".join(f"{name} {which}: {fmt}" for (name, which), fmt in chosen.items())
            console.print(f"Faster at {'x'.join(map(str, shape))}: {faster}.", style="dim")
    title = "Time over flax BatchNorm's, in training"
    console.print(passes_table(rows, title=title, labels=("shape", "norm")))
    console.print(_means_table(measured))
    save(config.json, rows)
    return rows


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
    the output, the new running statistics and, in the second pass, the gradients. A pass that reads
    x and writes an array of its size stands beside them: of such a normalization must make at least
    one and a half forward (x twice, y) and four in all (and x and the cotangent twice, dx).
    """
    x, cotangent = map(jnp.asarray, normal_arrays(np.random.default_rng(0), shape, shape))
    calls: dict[Key, Call] = {
        (ELEMENTWISE, "forward"): functools.partial(jax.jit(lambda x: 2 * x), x)
    }
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


def _torch_calls(num_groups: int, shape: Shape) -> dict[Key, Call]:
    from experiments._bench.torch_layers import torch_layer_calls

    return torch_layer_calls(num_groups, shape)


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


def _means_table(measured: list[dict[Key, np.ndarray]]) -> Table:
    table = plain_table(title="Geometric means over shapes")
    table.add_column("norm", no_wrap=True)
    names = dict.fromkeys(name for name, _ in measured[0] if name != ELEMENTWISE)
    references = [name for name in ("batch_norm", "naive_bcn", "torch_batch_norm") if name in names]
    columns = []
    for reference in references:
        for which, heading in zip(PASSES, HEADINGS, strict=True):
            columns.append((reference, which))
            table.add_column(f"{heading}\n/ {reference.replace('_', ' ')}", justify="right")
    for name in names:
        means = (geometric_mean_ratio(measured, name, *column) for column in columns)
        table.add_row(name, *(f"{mean:.2f}" for mean in means))
    return table
