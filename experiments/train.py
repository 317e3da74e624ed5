"""Trains a recipe: `python -m experiments.train RECIPE [--a.b VALUE ...]`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import rich
import tyro
from rich.table import Table

from experiments._files import write_json
from experiments._recipes import Recipe, get_recipe, recipe_names
from experiments._run import Run
from wsbcn_flax.training import LoopConfig

_USAGE = """\
usage: python -m experiments.train RECIPE [--a.b VALUE ...]

Trains, evaluates, checkpoints and resumes. `RECIPE --help` lists the options. Recipes:
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Where a run goes and how often it reports.

    Attributes:
        recipe: what to run.
        out: the run's folder, runs/RECIPE if None. A run that was stopped resumes there.
        eval_every: steps between evaluations; at the end only if None.
        checkpoint_every: steps between checkpoints.
        log_every: steps between records of training metrics.
        tensorboard: whether to write TensorBoard's files too.
        progress: whether to display progress.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path | None = None
    eval_every: int | None = None
    checkpoint_every: int = 100
    log_every: int = 20
    tensorboard: bool = False
    progress: bool = True


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE + "\n".join(f"  {name}" for name in recipe_names()))
        return 0 if argv else 2
    name, *rest = argv
    try:
        default = TrainOptions(recipe=get_recipe(name))
        options = tyro.cli(TrainOptions, default=default, args=rest, prog=f"train {name}")
        train(options, folder=options.out or Path("runs") / name)
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def train(options: TrainOptions, *, folder: Path) -> dict[str, float]:
    """Trains in a folder, resuming what is there, and returns the final metrics.

    Raises:
        ValueError: if the folder holds a run of another recipe.
    """
    run = Run.build(options.recipe)
    _claim(folder, options.recipe)
    config = LoopConfig(
        steps=run.steps,
        log_every=options.log_every,
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        show_progress=options.progress,
    )
    _, metrics = run.fit_in(folder, config, tensorboard=options.tensorboard)
    write_json(folder / "result.json", metrics)
    rich.print(_table(folder, run.steps, metrics))
    return metrics


def _claim(folder: Path, recipe: Recipe) -> None:
    """Writes the recipe beside the run, or checks that the run there is this recipe's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.json"
    # As JSON gives it back: tuples become lists.
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if not path.exists():
        write_json(path, wanted)
    elif (found := json.loads(path.read_text())) != wanted:
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        raise ValueError(
            f"{folder} holds a run whose {', '.join(differing)} differ from what was asked for. "
            "Resume it with its own options (recipe.json), or choose another folder with --out."
        )


def _table(folder: Path, steps: int, metrics: dict[str, float]) -> Table:
    table = Table(title=f"{folder}: after {steps} steps")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{100 * value:.2f} %" if name.endswith("error") else f"{value:.4f}")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
