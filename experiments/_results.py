"""Results, and their tables."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table


class Result(NamedTuple):
    """The end of one run: the error is a fraction of the test set."""

    norm: str
    micro_batch: int
    seed: int
    test_error: float
    test_loss: float


class Spread(NamedTuple):
    """Test error in percent over seeds."""

    mean: float
    low: float
    high: float


def spread(results: Sequence[Result], norm: str, micro_batch: int) -> Spread:
    """Mean, least and greatest test error of one cell of the comparison, in percent."""
    errors = [100 * r.test_error for r in results if (r.norm, r.micro_batch) == (norm, micro_batch)]
    return Spread(sum(errors) / len(errors), min(errors), max(errors))


def display_name(norm: str) -> str:
    """``bcn_ws`` as people write it: BCN+WS."""
    return norm.replace("_", "+").upper()


def summary_table(results: Sequence[Result], *, title: str) -> Table:
    """Mean test error in percent with its range over seeds, by normalization and micro-batch."""
    sizes = sorted({result.micro_batch for result in results})
    table = Table(title=title)
    table.add_column("normalization")
    for size in sizes:
        table.add_column(f"micro-batch {size}", justify="right")
    for norm in dict.fromkeys(result.norm for result in results):
        cells = (spread(results, norm, size) for size in sizes)
        table.add_row(
            display_name(norm), *(f"{c.mean:.1f} \\[{c.low:.1f}, {c.high:.1f}]" for c in cells)
        )
    return table


def metric_table(title: str, metrics: Mapping[str, float]) -> Table:
    """One metric a row; errors are fractions and shown in percent."""
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{100 * value:.2f} %" if name.endswith("error") else f"{value:.4f}")
    return table
