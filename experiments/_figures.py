"""Figures of test error."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsbcn_flax._extras import require


@contextlib.contextmanager
def error_figure(path: Path, *, xlabel: str) -> Iterator[Any]:
    """Yields the axes of a figure of test error in percent, which it then writes to a file.

    Raises:
        ImportError: If matplotlib is not installed; names the extra.
    """
    require("matplotlib", extra="plots").use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    try:
        yield axes
        axes.set_xlabel(xlabel)
        axes.set_ylabel("test error (%)")
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)
