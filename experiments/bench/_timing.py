"""Options, timing and tables of all measurements."""

import dataclasses
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from rich.table import Table

from experiments._tables import Column, table
from wsbcn_flax._extras import require
from wsbcn_flax.training.progress import Progress

Key = tuple[str, str]  # Name of a form, and one of PASSES or whatever else it is measured for.
Call = Callable[[], Any]
Shape = tuple[int, int, int, int]
KeyT = TypeVar("KeyT", bound=tuple[Any, ...])

PASSES = {"forward": "forward", "forward_backward": "+ backward"}
_QUICK_ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """The options of every measurement.

    Attributes:
        json: File to write the figures to, replacing it; without one only tables are printed.
        quick: Whether to do only what shows that everything runs; the figures mean nothing.
        repeats: Number of rounds in which each form is timed once; at most three if ``quick``.
    """

    json: Path | None = None
    quick: bool = False
    repeats: int = 120

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, received {self.repeats}.")

    @property
    def rounds(self) -> int:
        """Number of rounds that are timed."""
        return min(self.repeats, _QUICK_ROUNDS) if self.quick else self.repeats

    def measure(self) -> Any:
        """Measures, prints tables, and returns the figures as JSON values."""
        raise NotImplementedError


def interleaved_seconds(
    calls: Mapping[KeyT, Call],
    description: str = "measure",
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[KeyT, np.ndarray]:
    """Times every call once per round, so that what disturbs the machine disturbs them all alike.

    Each call is first compiled and run once more. The order changes from round to round, see
    `balanced_order`, and a call's time ends when all of its results are there.

    Args:
        calls: Functions of no arguments to compare.
        description: Description of the progress bar.
        rounds: Number of times that each is timed.
        clock: Function that returns the time in seconds.

    Returns:
        Seconds of every call, [rounds].
    """
    seconds = {key: np.empty(rounds) for key in calls}
    keys = list(calls)
    with Progress(description, total=len(calls) + rounds, live=False) as progress:
        for number, call in enumerate(calls.values(), start=1):
            for _ in range(2):
                jax.block_until_ready(call())
            progress.update(number)
        for index in range(rounds):
            for key in (keys[position] for position in balanced_order(len(keys), index)):
                begin = clock()
                result = jax.block_until_ready(calls[key]())
                seconds[key][index] = clock() - begin
                del result  # Freed here, outside of the time taken.
            progress.update(len(calls) + index + 1)
    return seconds


def balanced_order(count: int, index: int) -> list[int]:
    """Returns the order in which to time ``count`` calls in round ``index``: rotations of a zigzag.

    What runs before a call changes its time by a tenth and more, by the caches and the memory it
    leaves behind. In ``count`` rounds (twice as many if that is odd) every call stands at every
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
    """Returns the median over rounds of one call's time over another's in the same round."""
    return float(np.median(seconds / reference))


def ratio_rows(
    seconds: Mapping[KeyT, np.ndarray],
    labels: Sequence[str],
    ratio_key: str,
    reference: Callable[[KeyT], KeyT],
    **same: Any,
) -> list[dict[str, Any]]:
    """Returns a row for each call, as JSON values: its labels, and its ratio to a reference."""
    return [
        {
            **same,
            **dict(zip(labels, key, strict=False)),
            ratio_key: ratio(times, seconds[reference(key)]),
            **median_and_spread(times),
        }
        for key, times in seconds.items()
    ]


def median_and_spread(seconds: np.ndarray) -> dict[str, float]:
    """Returns the median in ms, and the interquartile range as a fraction of the median."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return {"median_ms": float(median) * 1e3, "spread": float((high - low) / median)}


def normal_arrays(*shapes: Shape) -> list[np.ndarray]:
    """Makes float32 arrays of a normal distribution, the same in every run."""
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape, np.float32) for shape in shapes]


def both_passes(
    name: str, function: Callable[..., Any], fixed: Any, cotangent: Any, *arguments: Any
) -> dict[Key, Call]:
    """Makes the jitted calls of ``function(fixed, *arguments) -> (output, rest)``, by pass.

    The second pass returns the output, the gradients of ``arguments``, and the rest.
    """

    def forward_backward(fixed, cotangent, *arguments):
        bound = functools.partial(function, fixed)
        y, pull_back, rest = jax.vjp(bound, *arguments, has_aux=True)
        return y, pull_back(cotangent), rest

    forward, backward = jax.jit(function), jax.jit(forward_backward)
    return {
        (name, "forward"): functools.partial(forward, fixed, *arguments),
        (name, "forward_backward"): functools.partial(backward, fixed, cotangent, *arguments),
    }


def elementwise(arrays: Any) -> dict[Key, Call]:
    """Makes the call of one elementwise pass over arrays, which reads and writes all of them."""
    double = jax.jit(lambda arrays: jax.tree.map(lambda x: 2 * x, arrays))
    return {("elementwise", "forward"): functools.partial(double, arrays)}


def passes_table(title: str, rows: Iterable[Mapping[str, Any]], *labels: str, key: str) -> Table:
    """Makes a table with a line for each combination of labels, and both passes side by side."""
    columns: dict[str, Column] = {label: (label, shape_text) for label in labels}
    for which, heading in PASSES.items():
        for name, shown in ((key, heading), ("median_ms", "ms"), ("spread", "spread")):
            columns[f"{name} {which}"] = (shown, "{:.2f}".format)
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        names = [row[label] for label in labels]
        line = lines.setdefault(str(names), dict.fromkeys(columns) | dict(row))
        line |= {f"{name} {row['pass']}": value for name, value in row.items()}
    return table(title, list(lines.values()), columns)


def shape_text(value: str | Sequence[int]) -> str:
    """Returns a shape as 2x56x56x256, and text as it is."""
    return value if isinstance(value, str) else "x".join(map(str, value))


def load_torch() -> Any:
    """Imports PyTorch's side of the measurements, and gives PyTorch all cores, as XLA has.

    Raises:
        ImportError: If PyTorch is not installed; names the extra.
    """
    require("torch", extra="torch").set_num_threads(os.cpu_count() or 1)
    return importlib.import_module("experiments.bench._torch")


def keep_faster_format(
    seconds: Mapping[Key, np.ndarray],
) -> tuple[dict[Key, np.ndarray], dict[Key, str]]:
    """Keeps, of calls named "NAME/FORMAT", those of the memory format with the lower median.

    Returns:
        Times by NAME, those of other calls included, and the format of each call kept.
    """
    kept, formats = {}, {}
    for (name, which), times in seconds.items():
        name, _, memory_format = name.partition("/")
        if (name, which) not in kept or np.median(times) < np.median(kept[name, which]):
            kept[name, which] = times
            formats |= {(name, which): memory_format} if memory_format else {}
    return kept, formats
