"""What measurements show: a bar while they run, then the machine and tables."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HEADINGS = ("forward", "+ backward")


def machine_facts() -> str:
    """What the figures depend on, in one line."""
    return (
        f"{os.cpu_count()} CPU cores, jax {jax.__version__}, backend {jax.default_backend()}, "
        f"device {jax.devices()[0].device_kind}"
    )


@contextmanager
def progress_bar(total: int, description: str = "measuring") -> Iterator[Callable[[], None]]:
    """A bar on the standard error, and what to call after each of ``total`` parts."""
    # No refreshing thread: it would compete with what is measured.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task(description, total=total)
        progress.refresh()

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        yield advance


def plain_table(*labels: str, title: str) -> Table:
    """An empty table as all measurements print theirs."""
    return Table(*labels, title=title, box=box.SIMPLE_HEAD, padding=0)


def passes_table(rows: list[dict[str, Any]], *, title: str, labels: Sequence[str]) -> Table:
    """One line for each combination of labels, with both passes side by side."""
    table = plain_table(*labels, title=title)
    for heading in HEADINGS:
        for column in (heading, "ms", "spread"):
            table.add_column(column, justify="right")
    for names, group in itertools.groupby(rows, lambda row: [row[label] for label in labels]):
        figures = [
            f"{value:.2f}" for row in group for value in row.values() if isinstance(value, float)
        ]
        table.add_row(*(_label(name) for name in names), *figures)
    return table


def rows_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    labels: Mapping[str, str],
    figures: Mapping[str, tuple[str, Callable[[Any], str]]],
) -> Table:
    """One line for each row.

    Args:
        rows: as they are written.
        title: of the table.
        labels: keys of the columns that say what the row is, with their headings.
        figures: keys of the columns of numbers, with their headings and formats; a number that is
            missing is a dash.
    """
    table = plain_table(*labels.values(), title=title)
    for heading, _ in figures.values():
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = (
            "-" if row[key] is None else show(row[key]) for key, (_, show) in figures.items()
        )
        table.add_row(*(_label(row[key]) for key in labels), *numbers)
    return table


def two_decimals(value: float) -> str:
    """As ratios are shown."""
    return f"{value:.2f}"


def in_units_of(unit: float, decimals: int = 0) -> Callable[[float], str]:
    """The format of a number in units such as 1e6, for megabytes."""
    return lambda value: f"{value / unit:,.{decimals}f}"


def _label(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
