"""Compares normalizations over micro-batch sizes: table, JSON and figure.

`python -m experiments.compare [--norms bn bcn_ws] [--micro-batches 1 2 64] [--seeds 0 1 2]`
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import rich
import tyro
from rich.table import Table

from experiments._command import run_command
from experiments._figures import draw_bars, require_matplotlib
from experiments._recipe import Recipe
from experiments._tables import table
from experiments.recipes import get_recipe
from wsbcn_flax.training import LoopConfig
from wsbcn_flax.training.progress import Progress
from wsbcn_flax.training.writers import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compares normalizations over micro-batch sizes.

    Attributes:
        data: Dataset of the recipes.
        model: Network of the recipes.
        norms: Rows of the table, {norm}[_{weight}] as in a recipe's name.
        micro_batches: Columns of the table: images normalized together; each divides the batch.
        seeds: Seeds; one run for each.
        epochs: Length of a run; the recipe's own if None.
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


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(lambda argv: compare(tyro.cli(CompareOptions, args=argv)), argv)


def compare(options: CompareOptions) -> list[Result]:
    """Runs every combination and writes the table, the JSON and the figure.

    Raises:
        ValueError: For an unknown recipe or a micro-batch size that does not divide the batch.
        ImportError: For a figure without matplotlib; before anything runs.
    """
    started = time.monotonic()
    # Everything that can fail fails before the first run.
    cells = [
        (norm, size, _recipe(options, norm, size))
        for norm in options.norms
        for size in options.micro_batches
    ]
    if options.figure:
        require_matplotlib()
    data = cells[0][2].load_data()
    options.out.mkdir(parents=True, exist_ok=True)

    results: list[Result] = []
    with Progress("compare", total=len(cells) * len(options.seeds)) as progress:
        for norm, size, recipe in cells:
            progress.note(f"compiling {norm}, micro-batch {size}")
            experiment = recipe.experiment(data)
            program = experiment.compile()
            config = LoopConfig(steps=experiment.steps, show_progress=sys.stdout.isatty())
            for seed in options.seeds:
                _, metrics = experiment.run(config=config, program=program, seed=seed)
                error, loss = metrics["eval_error"], metrics["eval_loss"]
                results.append(Result(norm, size, seed, error, loss))
                progress.update(len(results), {f"{norm}@{size} error": error})
                _write_json(options, results)
    count = len(options.seeds)
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    title = f"{options.data}, {options.model}: test error %, {seeds}"
    rich.print(_table(options, results, title=f"{title}, mean [min, max]"))
    if options.figure:
        lines = {
            display_name(norm): [
                (size, *spread(results, norm, size)) for size in sorted(options.micro_batches)
            ]
            for norm in options.norms
        }
        draw_bars(lines, options.out / "figure.png", title=title)
    minutes = (time.monotonic() - started) / 60
    rich.print(f"{len(results)} runs in {minutes:.1f} minutes; written to {options.out}/")
    return results


def spread(results: Sequence[Result], norm: str, micro_batch: int) -> Spread:
    """Returns mean, minimum and maximum test error of one cell of the comparison, in percent."""
    errors = [100 * r.test_error for r in results if (r.norm, r.micro_batch) == (norm, micro_batch)]
    return Spread(sum(errors) / len(errors), min(errors), max(errors))


def display_name(norm: str) -> str:
    """Returns ``bcn_ws`` as people write it: BCN+WS."""
    return norm.replace("_", "+").upper()


def _recipe(options: CompareOptions, norm: str, micro_batch: int) -> Recipe:
    recipe = get_recipe(f"{options.data}_{options.model}_{norm}")
    if micro_batch < 1 or recipe.batch.size % micro_batch:
        raise ValueError(
            f"A micro-batch must divide the batch of {recipe.batch.size}, received {micro_batch}."
        )
    # One device, so that BatchNorm normalizes over its micro-batch as on one chip of many.
    batch = dataclasses.replace(recipe.batch, micro=micro_batch, devices=1)
    epochs = recipe.epochs if options.epochs is None else options.epochs
    return dataclasses.replace(recipe, batch=batch, epochs=epochs)


def _table(options: CompareOptions, results: Sequence[Result], *, title: str) -> Table:
    rows = []
    for norm in options.norms:
        cells = {size: spread(results, norm, size) for size in sorted(options.micro_batches)}
        rows.append(
            {"normalization": display_name(norm)}
            | {
                f"micro-batch {size}": f"{cell.mean:.1f} [{cell.low:.1f}, {cell.high:.1f}]"
                for size, cell in cells.items()
            }
        )
    return table(title, rows)


def _write_json(options: CompareOptions, results: Sequence[Result]) -> None:
    document = {
        "options": {**dataclasses.asdict(options), "out": str(options.out)},
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "cpus": os.cpu_count(),
        "runs": [result._asdict() for result in results],
    }
    write_json(options.out / "results.json", document)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
