"""Options, timing and tables of all measurements."""

import abc
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich

from experiments._tables import table
from wsbcn_flax._extras import require
from wsbcn_flax.training.progress import Progress

Key = tuple[str, Any]  # Name of the timed form, and its pass or number of threads.
Call = Callable[[], Any]
Times = Mapping[Key, np.ndarray]  # Seconds of every call, [rounds].
Shape = tuple[int, int, int, int]

ELEMENTWISE: Key = ("elementwise", "forward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(abc.ABC):
    """The options of every measurement.

    Attributes:
        json: File to write the figures to, replaced if it exists; None only prints tables.
        quick: Whether to do the least that shows that everything runs; the figures mean nothing.
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
        return min(self.repeats, 3) if self.quick else self.repeats

    @abc.abstractmethod
    def measure(self) -> Any:
        """Measures, prints tables, and returns the figures as JSON values."""


def interleaved_seconds(
    calls: Mapping[Key, Call], *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, np.ndarray]:
    """Times every call once per round, so that disturbances affect all calls alike.

    Each call is first compiled and run once more. The order changes from round to round, see
    `balanced_order`. A call's time ends when all of its results are ready.
    """
    seconds = {key: np.empty(rounds) for key in calls}
    keys = list(calls)
    with Progress("measure", total=len(calls) + rounds, live=False) as progress:
        for number, call in enumerate(calls.values(), start=1):
            for _ in range(2):
                jax.block_until_ready(call())
            progress.update(number)
        for index in range(rounds):
            for key in (keys[position] for position in balanced_order(len(keys), index)):
                begin = clock()
                result = jax.block_until_ready(calls[key]())
                seconds[key][index] = clock() - begin
                del result  # Freed here, outside of the measured time.
            progress.update(len(calls) + index + 1)
    return seconds


def balanced_order(count: int, index: int) -> list[int]:
    """Returns the order of ``count`` calls in round ``index``, a rotation of a zigzag.

    The previous call changes a call's time by a tenth or more, through the caches and memory that
    it leaves behind. In ``count`` rounds (twice as many if ``count`` is odd), every call takes each
    place, and follows each other call, equally often (Williams, 1949).

    Example:
        >>> [balanced_order(4, index) for index in range(4)]
        [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]
    """
    zigzag = ((step + 1) // 2 * (1 if step % 2 else -1) for step in range(count))
    direction = -1 if index // count % 2 else 1
    return [(index + direction * offset) % count for offset in zigzag]


def figures(seconds: np.ndarray, **references: np.ndarray) -> dict[str, float]:
    """Returns a call's ratios to references, its median in ms, and its spread.

    A ratio is the median over rounds of the ratio of two times in the same round. The spread is the
    interquartile range divided by the median.
    """
    low, median, high = map(float, np.quantile(seconds, (0.25, 0.5, 0.75)))
    ratios = {f"ratio_to_{k}": float(np.median(seconds / each)) for k, each in references.items()}
    return {**ratios, "median_ms": 1e3 * median, "spread": (high - low) / median}


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows with the same keys as a table, where "/ X" heads the ratios to X."""

    def text(value: Any) -> str:
        return f"{value:,.2f}" if isinstance(value, float) else str(value)

    headings = {key: key.replace("ratio_to_", "/ ").replace("_", "\n") for key in rows[0]}
    rich.print(table(title, rows, {key: (heading, text) for key, heading in headings.items()}))


def load_torch() -> Any:
    """Imports the measurements of PyTorch, and gives PyTorch all cores, as XLA has."""
    torch = require("torch", extra="torch")
    torch.set_num_threads(os.cpu_count() or 1)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    return require("experiments.bench._torch", extra="torch")


def normal_arrays(*shapes: Shape) -> list[np.ndarray]:
    """Makes normally distributed float32 arrays, the same in every run."""
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape, np.float32) for shape in shapes]


def both_passes(
    name: str, function: Callable[..., Any], fixed: Any, cotangent: Any, *arguments: Any
) -> dict[Key, Call]:
    """Makes a jitted call for each pass of ``function(fixed, *arguments) -> (output, rest)``.

    "forward_backward" returns the output, the gradients of ``arguments``, and the rest.
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
    return {ELEMENTWISE: functools.partial(double, arrays)}
