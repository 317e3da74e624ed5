"""Figures of test error: against micro-batch size, and by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments._results import Result, display_name, spread


def require_matplotlib() -> None:
    """Raises ImportError, naming the extra, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "The figure needs matplotlib: pip install 'wsbcn_flax[plots]', or pass --no-figure."
        ) from error


def draw(results: Sequence[Result], path: Path, *, title: str) -> None:
    """Draws mean error by micro-batch size, a line for each normalization, bars from min to max."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    norms = list(dict.fromkeys(result.norm for result in results))
    sizes = sorted({result.micro_batch for result in results})
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for index, norm in enumerate(norms):
        cells = [spread(results, norm, size) for size in sizes]
        means = [cell.mean for cell in cells]
        bars = [cell.mean - cell.low for cell in cells], [cell.high - cell.mean for cell in cells]
        # Side by side on the logarithmic axis, so that equal results stay visible.
        beside = [size * 1.06 ** (index - (len(norms) - 1) / 2) for size in sizes]
        axes.errorbar(beside, means, yerr=bars, marker="o", capsize=3, label=display_name(norm))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("micro-batch size (images normalized together)")
    # Logarithmic: a normalization that falls apart would flatten the others into one line.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel("test error (%)")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path) -> None:
    """Draws test error in percent by step, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, (steps, errors) in curves.items():
        axes.plot(steps, errors, marker="o", label=f"{name}: {errors[-1]:.2f} %")
    axes.set_xlabel("step")
    axes.set_ylabel("test error (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
