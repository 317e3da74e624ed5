"""Figures of test error: against micro-batch size, and by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsbcn_flax._extras import require


def require_matplotlib() -> None:
    """Raises ImportError, naming the extra, where matplotlib is not installed."""
    require("matplotlib", extra="plots")


def draw_bars(lines: Mapping[str, Sequence[tuple[float, ...]]], path: Path, *, title: str) -> None:
    """Draws a line for each name: micro-batch size, mean error in percent, minimum, maximum."""
    from matplotlib import ticker

    figure, axes = _axes()
    for index, (name, cells) in enumerate(lines.items()):
        sizes, means, lows, highs = zip(*cells, strict=True)
        bars = [
            [mean - low for mean, low in zip(means, lows, strict=True)],
            [high - mean for mean, high in zip(means, highs, strict=True)],
        ]
        # Side by side on the logarithmic axis, so that equal results stay visible.
        beside = [size * 1.06 ** (index - (len(lines) - 1) / 2) for size in sizes]
        axes.errorbar(beside, means, yerr=bars, marker="o", capsize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("micro-batch size (images normalized together)")
    # Logarithmic: a normalization that falls apart would flatten the others into one line.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(title)
    _save(figure, axes, path)


def draw_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path) -> None:
    """Draws test error in percent by step, a line for each run."""
    figure, axes = _axes()
    for name, (steps, errors) in curves.items():
        axes.plot(steps, errors, marker="o", label=f"{name}: {errors[-1]:.2f} %")
    axes.set_xlabel("step")
    _save(figure, axes, path)


def _axes() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 4.0), layout="constrained")


def _save(figure: Any, axes: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    axes.set_ylabel("test error (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
