"""Tables and facts that commands print."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_FIGURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
Column = tuple[str, Callable[[Any], str]]


def table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column] | None = None
) -> Group:
    """Makes a table of one line for each row; None is shown as a dash.

    Rows have the same keys. ``columns`` maps each key to show to its heading and format; by default
    all keys are shown as they are.
    """
    shown = columns or {key: (key, str) for key in rows[0]}
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, (heading, _) in enumerate(shown.values()):
        made.add_column(escape(heading), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        cells = ((row[key], show) for key, (_, show) in shown.items())
        made.add_row(*(escape("-" if value is None else show(value)) for value, show in cells))
    # A table's own title would be broken at the table's width, in the middle of a path.
    return Group(Text(title, style="italic", no_wrap=True, overflow="ignore"), made)


def metric_table(title: str, metrics: Mapping[str, float]) -> Group:
    """Makes a table of one metric a row; errors are fractions and shown in percent."""
    rows = [
        {"metric": name, "value": f"{100 * x:.2f} %" if name.endswith("error") else f"{x:.4f}"}
        for name, x in metrics.items()
    ]
    return table(title, rows)


def machine_facts() -> str:
    """Returns one line about the hardware and software that measured times depend on."""
    return (
        f"{os.cpu_count()} CPU cores, jax {jax.__version__}, backend {jax.default_backend()}, "
        f"device {jax.devices()[0].device_kind}"
    )


def check_writable(path: Path | None, *, option: str = "--json", figure: bool = False) -> None:
    """Raises OSError or ValueError if a file cannot be written; called before minutes of work."""
    if path is None:
        return
    if figure and path.suffix.lower() not in _FIGURES:
        raise ValueError(f"{option} must end in {', '.join(_FIGURES)}, received {path}.")
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise type(error)(
            f"{option} must name a file that can be written, received {path}: {error.strerror}."
        ) from error
    if is_new:
        path.unlink()
