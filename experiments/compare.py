"""Compares normalizations over micro-batch sizes: table, JSON and figure.

`python -m experiments.compare [--norms bn bcn_ws] [--micro-batches 1 2 64] [--seeds 0 1 2]`
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import rich
import tyro

from experiments._command import run_command
from experiments._config import Recipe
from experiments._figure import draw, require_matplotlib
from experiments._files import write_json
from experiments._recipes import get_recipe
from experiments._results import Result, summary_table
from experiments._run import Run
from wsbcn_flax.training import LoopConfig, Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What to compare.

    Attributes:
        data: the recipes' data.
        model: the recipes' network.
        norms: rows of the table, {norm}[_{weight}] as in a recipe's name.
        micro_batches: columns: images normalized together; each divides the batch.
        seeds: a run for each.
        epochs: length of a run; the recipe's own if None.
        out: folder for results.json and figure.png.
        figure: whether to draw the figure (needs the extra "plots").
    """

    data: str = "mnist5k"
    model: str = "resnet8"
    norms: tuple[str, ...] = ("bn", "gn", "gn_ws", "bcn_ws")
    micro_batches: tuple[int, ...] = (1, 2, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: float | None = None
    out: Path = Path("runs/compare")
    figure: bool = True

    def __post_init__(self):
        for name in ("norms", "micro_batches", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, received none.")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(lambda: compare(tyro.cli(CompareOptions, args=argv, prog="compare")))


def compare(options: CompareOptions) -> list[Result]:
    """Runs every combination and writes the table, the JSON and the figure.

    Raises:
        ValueError: for an unknown recipe or a micro-batch size that does not divide the batch.
        ImportError: for a figure without matplotlib; before anything runs.
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
    options.out.mkdir(parents=True, exist_ok=True)

    results: list[Result] = []
    total = len(cells) * len(options.seeds)
    with Progress("compare", total=total) as progress:
        for norm, size, recipe in cells:
            for result in _run_seeds(norm, size, recipe, options.seeds):
                results.append(result)
                progress.update(len(results), {f"{norm}@{size} error": result.test_error})
                _write_json(options, results)
    title = f"{options.data}, {options.model}: test error %, {len(options.seeds)} seeds"
    rich.print(summary_table(results, title=f"{title}, mean \\[min, max]"))
    if options.figure:
        draw(results, options.out / "figure.png", title=title)
    minutes = (time.monotonic() - started) / 60
    rich.print(f"{len(results)} runs in {minutes:.1f} minutes; written to {options.out}/")
    return results


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


def _run_seeds(
    norm: str, micro_batch: int, recipe: Recipe, seeds: tuple[int, ...]
) -> Iterator[Result]:
    """One run for each seed, all with the same compiled step."""
    run = Run.build(recipe)
    config = LoopConfig(steps=run.steps, show_progress=sys.stdout.isatty())
    for seed in seeds:
        _, metrics = run.fit(config, seed=seed)
        yield Result(norm, micro_batch, seed, metrics["eval_error"], metrics["eval_loss"])


def _write_json(options: CompareOptions, results: list[Result]) -> None:
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
