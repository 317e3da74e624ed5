"""Measures what the normalizations cost on this machine, as ratios taken side by side.

    python -m experiments.bench layers --json runs/layers.json
    python -m experiments.bench ws --json runs/ws.json

Each takes under a minute on two CPU cores. Every form runs once per round, in an order that
changes, and a ratio is the median over rounds of two times of the same round. A form's spread is
the interquartile range of its times over their median: measure on a quiet machine, and trust no
difference that is small beside it.
"""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import _layer_bench as bench

_QUICK_ROUNDS = 3
_HEADINGS = ("forward", "+ backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command:
    """What every measurement takes.

    Attributes:
        json: file to write the rows to, replacing it; only the tables are printed without one.
        repeats: rounds in which each form is timed once.
        quick: three rounds, to see that everything runs; the figures mean nothing.
    """

    json: Path | None = None
    repeats: int = 120
    quick: bool = False

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, received {self.repeats}.")

    @property
    def rounds(self) -> int:
        """How many rounds are timed."""
        return min(self.repeats, _QUICK_ROUNDS) if self.quick else self.repeats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers(_Command):
    """Normalization layers in training, against flax.linen.BatchNorm.

    Attributes:
        shapes: of the float32 activations: batch, height, width and channels, four numbers each.
        num_groups: groups of the group and batch-channel normalizations; divides all channels.
    """

    shapes: tuple[bench.Shape, ...] = (
        (2, 56, 56, 256),
        (8, 32, 32, 64),
        (2, 14, 14, 1024),
        (64, 14, 14, 32),
    )
    num_groups: int = 32

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization(_Command):
    """Weight standardization of ResNet-50's kernels, against one elementwise pass over them."""

    repeats: int = 20


def run_layers(config: Layers, console: Console) -> list[dict[str, Any]]:
    """Measures, prints and returns the rows of ``layers``, writing them where asked to."""
    _check_writable(config.json)
    norms = bench.normalizations(config.num_groups)
    measured = []
    with _progress(len(config.shapes) * config.rounds) as advance:
        for shape in config.shapes:
            calls = bench.layer_calls(norms, shape)
            measured.append(
                bench.interleaved_seconds(calls, rounds=config.rounds, on_round=advance)
            )
    rows = [
        row
        for shape, seconds in zip(config.shapes, measured, strict=True)
        for row in bench.layer_rows(shape, seconds)
    ]
    console.print(machine_facts())
    console.print(
        _rows_table(rows, title="Time over flax BatchNorm's, in training", labels=("shape", "norm"))
    )
    console.print(_means_table(measured, list(norms)))
    _write(config.json, rows)
    return rows


def run_weight_standardization(
    config: WeightStandardization, console: Console
) -> list[dict[str, Any]]:
    """Measures, prints and returns the rows of ``ws``, writing them where asked to."""
    _check_writable(config.json)
    with _progress(config.rounds) as advance:
        calls = bench.weight_calls(bench.resnet50_kernels())
        seconds = bench.interleaved_seconds(calls, rounds=config.rounds, on_round=advance)
    rows = bench.weight_rows(seconds)
    console.print(machine_facts())
    console.print(
        _rows_table(rows, title="Time over one elementwise pass's, ResNet-50", labels=("form",))
    )
    _write(config.json, rows)
    return rows


def machine_facts() -> str:
    """What the figures depend on, in one line."""
    return (
        f"{os.cpu_count()} CPU cores, jax {jax.__version__}, backend {jax.default_backend()}, "
        f"device {jax.devices()[0].device_kind}"
    )


@contextmanager
def _progress(rounds: int) -> Iterator[Callable[[], None]]:
    # No refreshing thread: it would compete with what is measured.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=rounds)
        progress.refresh()

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        yield advance


def _rows_table(rows: list[dict[str, Any]], *, title: str, labels: Sequence[str]) -> Table:
    """One line for each combination of labels, with both passes side by side."""
    table = Table(*labels, title=title, box=box.SIMPLE_HEAD, padding=0)
    for heading in _HEADINGS:
        for column in (heading, "ms", "spread"):
            table.add_column(column, justify="right")
    for names, group in itertools.groupby(rows, lambda row: [row[label] for label in labels]):
        figures = [
            f"{value:.2f}" for row in group for value in row.values() if isinstance(value, float)
        ]
        table.add_row(*(_label(name) for name in names), *figures)
    return table


def _means_table(measured: list[dict[bench.Key, Any]], names: list[str]) -> Table:
    table = Table("norm", title="Geometric means over shapes", box=box.SIMPLE_HEAD, padding=0)
    columns = []
    for reference in ("batch_norm", "naive_bcn"):
        for which, heading in zip(bench.PASSES, _HEADINGS, strict=True):
            columns.append((reference, which))
            table.add_column(f"{heading}\n/ {reference}", justify="right")
    for name in names:
        means = (bench.geometric_mean_ratio(measured, name, *column) for column in columns)
        table.add_row(name, *(f"{mean:.2f}" for mean in means))
    return table


def _label(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else value


def _check_writable(path: Path | None) -> None:
    """Raises OSError now for a file that could not be written after minutes of measuring."""
    if path is None:
        return
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise type(error)(
            f"--json must name a file that can be written, received {path}: {error.strerror}."
        ) from error
    if is_new:
        path.unlink()


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    """Runs the command line."""
    config = tyro.cli(
        Annotated[Layers, tyro.conf.subcommand("layers")]
        | Annotated[WeightStandardization, tyro.conf.subcommand("ws")],
        description=__doc__,
    )
    console = Console()
    try:
        if isinstance(config, Layers):
            run_layers(config, console)
        else:
            run_weight_standardization(config, console)
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
