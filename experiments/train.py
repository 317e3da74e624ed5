"""Trains a recipe: `python -m experiments.train RECIPE [--a.b VALUE ...]`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import rich
import tyro

from experiments import recipes
from experiments._command import run_command
from experiments._recipe import Recipe
from experiments._tables import metric_table
from wsbcn_flax.training import LoopConfig
from wsbcn_flax.training.processes import (
    is_first_process,
    join_processes,
    leave,
    on_first_process,
)
from wsbcn_flax.training.writers import write_json

_USAGE = """\
usage: python -m experiments.train RECIPE [--a.b VALUE ...]

Trains, evaluates, checkpoints and resumes. `RECIPE --help` lists the options.
Exit status: 0 trained to the end, 1 error, 2 usage, 75 stopped by SIGTERM with a checkpoint (the
same command resumes). If another process of the run died: 1, or 134 by an abort. `--pdb` opens the
debugger at an error.

A recipe is named {{data}}_{{model}}_{{norm}}[_{{weight}}]:
  {names}

Recipes of published results, with the error to expect:
  {published}

For example mnist5k_resnet8_bcn_ws, fashion_resnet20_gn_ws, imagenet_resnet50_bcn_ws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Trains a recipe in a folder.

    Attributes:
        recipe: Recipe to run.
        out: Folder of the run; runs/RECIPE if None. A run that was stopped resumes there.
        eval_every: Number of steps between evaluations; evaluates at the end only if None.
        checkpoint_every: Number of steps between checkpoints.
        log_every: Number of steps between records of training metrics.
        tensorboard: Whether to write TensorBoard's files too.
        progress: Whether to display progress.
        cluster: Whether JAX finds the other processes of the run itself (SLURM, Cloud TPU, ...).
            Otherwise JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.
        heartbeat_timeout: Seconds without a sign of life after which a process counts as dead.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path | None = None
    eval_every: int | None = None
    checkpoint_every: int = 100
    log_every: int = 20
    tensorboard: bool = False
    progress: bool = True
    cluster: bool = False
    heartbeat_timeout: int = 100


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        published = (f"{name:40}{row.error}" for name, row in recipes.PUBLISHED.items())
        names = recipes.describe_names(separator="\n  ")
        print(_USAGE.format(names=names, published="\n  ".join(published)))
        return 0 if argv else 2
    return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    name, *arguments = argv
    options = tyro.cli(
        TrainOptions,
        default=TrainOptions(recipe=recipes.get_recipe(name)),
        args=arguments,
        prog=f"train {name}",
        description=recipes.describe(name),
    )
    join_processes(cluster=options.cluster, heartbeat_timeout=options.heartbeat_timeout)
    train(options, folder=options.out or Path("runs") / name)


def train(options: TrainOptions, *, folder: Path) -> dict[str, float]:
    """Trains in a folder, resuming what is there, and returns the final metrics.

    Raises:
        ValueError: If the folder holds a run of another recipe.
    """
    recipe = options.recipe
    experiment = recipe.experiment(recipe.load_data())
    program = experiment.compile()  # Refuses a batch that does not divide, before files are made.
    on_first_process(lambda: _claim(folder, recipe))
    config = LoopConfig(
        steps=experiment.steps,
        log_every=options.log_every,
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        show_progress=options.progress and is_first_process(),
    )
    _, metrics = experiment.run(
        folder, config=config, program=program, tensorboard=options.tensorboard
    )
    if is_first_process():
        write_json(folder / "result.json", metrics)
        rich.print(metric_table(f"{folder}: after {experiment.steps} steps", metrics))
    return metrics


def _claim(folder: Path, recipe: Recipe) -> None:
    """Writes the recipe beside the run, or checks that the run there is this recipe's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.json"
    # As JSON gives it back: tuples become lists.
    wanted = json.loads(json.dumps(recipes.recipe_to_dict(recipe)))
    if not path.exists():
        write_json(path, wanted)
    elif (found := json.loads(path.read_text())) != wanted:
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        raise ValueError(
            f"{folder} holds a run whose {', '.join(differing)} differ from what was asked for. "
            "Resume it with its own options (recipe.json), or choose another folder with --out."
        )


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
