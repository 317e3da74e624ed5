"""Compares normalizations over micro-batch sizes, in a table, a JSON file and a figure.

`python -m experiments.compare [--norms bn bcn_ws] [--micro-batches 1 2 64] [--seeds 0 1 2]`
"""

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import rich

from experiments._command import make_main
from experiments._figures import error_figure
from experiments._recipe import Recipe
from experiments._tables import table
from experiments.recipes import get_recipe
from wsbcn_flax._extras import require
from wsbcn_flax._folder_lock import lock_folder
from wsbcn_flax.training import LoopConfig
from wsbcn_flax.training.progress import Progress
from wsbcn_flax.training.writers import write_json

Spread = tuple[float, float, float]  # Mean, minimum and maximum over seeds.


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compares normalizations over micro-batch sizes.

    Attributes:
        data: Dataset of the recipes.
        model: Network of the recipes.
        norms: Normalizations, a row each, named {norm}[_{weight}] as in a recipe's name.
        micro_batches: Numbers of images normalized together, a column each; must divide the batch.
        seeds: Seeds, a run each.
        epochs: Length of a run in epochs; the recipe's own if None.
        out: Folder for results.json and figure.png.
        figure: Whether to draw the figure (needs the extra "plots").
    """

    data: str = "mnist5k"
    model: str = "resnet8"
    norms: tuple[str, ...] = ("bn", "gn", "gn_ws", "bcn_ws")
    micro_batches: tuple[int, ...] = (1, 2, 64)
    seeds: tuple[int, ...] = (0,)
    epochs: float | None = None
    out: Path = Path("runs/compare")
    figure: bool = True

    def __post_init__(self):
        for name in ("norms", "micro_batches", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, received none.")


class Result(NamedTuple):
    """The test result at the end of one run; the error is a fraction of the test set."""

    norm: str
    micro_batch: int
    seed: int
    test_error: float
    test_loss: float


def compare(options: CompareOptions) -> list[Result]:
    """Runs every combination and writes the table, the JSON and the figure.

    Raises:
        ValueError: For a task without a test error, an unknown recipe, or a micro-batch size that
            does not divide the batch.
        ImportError: If a figure is wanted without matplotlib; raised before anything runs.
    """
    started = time.monotonic()
    # Errors are raised before the first run.
    sizes = sorted(options.micro_batches)
    cells = itertools.product(options.norms, sizes)
    recipes = {(norm, size): _recipe(options, norm, size) for norm, size in cells}
    if options.figure:
        require("matplotlib", extra="plots")
    data = next(iter(recipes.values())).load_data()
    document = {
        "options": {**dataclasses.asdict(options), "out": str(options.out)},
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "cpus": os.cpu_count(),
    }

    results: list[Result] = []
    total = len(recipes) * len(options.seeds)
    with lock_folder(options.out), Progress("compare", total=total) as progress:
        for (norm, size), recipe in recipes.items():
            progress.note(f"compiling {norm}, micro-batch {size}")
            experiment = recipe.experiment(data)
            program = experiment.compile()
            config = LoopConfig(steps=experiment.steps, show_progress=sys.stderr.isatty())
            for seed in options.seeds:
                _, metrics = experiment.run(config=config, program=program, seed=seed)
                error, loss = metrics["eval_error"], metrics["eval_loss"]
                results.append(Result(norm, size, seed, error, loss))
                progress.update(len(results), {f"{norm}@{size} error": error})
                runs = [result._asdict() for result in results]
                write_json(options.out / "results.json", {**document, "runs": runs})

    count = len(options.seeds)
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    title = f"{options.data}, {options.model}: test error %, {seeds}"
    spreads = {
        norm.replace("_", "+").upper(): {size: spread(results, norm, size) for size in sizes}
        for norm in options.norms
    }
    rows = [
        {"normalization": name}
        | {f"micro-batch {size}": "{:.1f} [{:.1f}, {:.1f}]".format(*row[size]) for size in sizes}
        for name, row in spreads.items()
    ]
    rich.print(table(f"{title}, mean [min, max]", rows))
    if options.figure:
        _draw(spreads, options.out / "figure.png", title=title)
    minutes = (time.monotonic() - started) / 60
    rich.print(f"{len(results)} runs in {minutes:.1f} minutes; written to {options.out}/")
    return results


def spread(results: Sequence[Result], norm: str, micro_batch: int) -> Spread:
    """Returns mean, minimum and maximum test error of one cell of the comparison, in percent."""
    errors = [100 * r.test_error for r in results if (r.norm, r.micro_batch) == (norm, micro_batch)]
    return sum(errors) / len(errors), min(errors), max(errors)


def _recipe(options: CompareOptions, norm: str, micro_batch: int) -> Recipe:
    recipe = get_recipe(f"{options.data}_{options.model}_{norm}")
    if not recipe.has_error:
        raise ValueError(
            f"compare is for tasks that have a test error, received data {options.data} and model "
            f"{options.model}. Use python -m experiments.train and evaluate."
        )
    if micro_batch < 1 or recipe.batch.size % micro_batch:
        raise ValueError(
            f"A micro-batch must divide the batch of {recipe.batch.size}, received {micro_batch}."
        )
    # On one device, BatchNorm normalizes over its micro-batch, as on one chip of many.
    batch = dataclasses.replace(recipe.batch, micro=micro_batch, devices=1)
    epochs = recipe.epochs if options.epochs is None else options.epochs
    return dataclasses.replace(recipe, batch=batch, epochs=epochs)


def _draw(spreads: Mapping[str, Mapping[int, Spread]], path: Path, *, title: str) -> None:
    """Draws a line for each normalization, with bars from the minimum to the maximum."""
    ticker = require("matplotlib.ticker", extra="plots")
    sizes = list(next(iter(spreads.values())))
    with error_figure(path, xlabel="micro-batch size (images normalized together)") as axes:
        for index, (name, row) in enumerate(spreads.items()):
            mean, low, high = np.transpose(list(row.values()))
            # Points are moved apart on the logarithmic axis, so that equal results stay visible.
            beside = np.array(sizes) * 1.06 ** (index - (len(spreads) - 1) / 2)
            bars = [mean - low, high - mean]
            axes.errorbar(beside, mean, yerr=bars, marker="o", capsize=3, label=name)
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.xaxis.minorticks_off()
        # On a linear axis, a normalization that fails would flatten the others into one line.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())


main = make_main(compare, options=CompareOptions)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
