"""Trains a recipe: `python -m experiments.train RECIPE [--a.b VALUE ...]`."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Annotated

import rich
import tyro

from experiments import recipes
from experiments._command import run_command
from experiments._recipe import Recipe
from experiments._tables import metric_table
from wsbcn_flax.training import LoopConfig, processes
from wsbcn_flax.training.writers import write_json

_USAGE = """\
usage: python -m experiments.train RECIPE [--a.b VALUE ...]

Trains, evaluates, checkpoints and resumes. `RECIPE --help` lists the options.
Exit status: 0 trained to the end, 1 error, 2 usage, 75 stopped by SIGTERM or Ctrl-C with a
checkpoint (the same command resumes), 130 stopped at once by a second Ctrl-C. If another process of
the run died: 1, or 134 by an abort. `--pdb` opens the debugger at an error.

A recipe is named {{data}}_{{model}}_{{norm}}[_{{weight}}]:
  {names}

Recipes of published results, with the result to expect:
  {published}

For example mnist5k_resnet8_bcn_ws, fashion_resnet20_gn_ws, imagenet_resnet50_bcn_ws."""


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    status = run_command(_train_by_name, argv)
    return status if argv else 2


def _train_by_name(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        published = (f"{name:40}{row.result}" for name, row in recipes.PUBLISHED.items())
        names = recipes.describe_names(separator="\n  ")
        print(_USAGE.format(names=names, published="\n  ".join(published)))
        return
    name, *arguments = argv
    if name.startswith("-"):
        raise ValueError(
            f"The name of the recipe comes first, received {name}: train RECIPE {name} ..."
        )
    tyro.cli(
        functools.partial(train, recipe=recipes.get_recipe(name), out=Path("runs") / name),
        args=arguments,
        prog=f"python -m experiments.train {name}",
        description=recipes.describe(name),
    )


def train(
    *,
    recipe: Annotated[Recipe, tyro.conf.arg(name="")],
    out: Path,
    eval_every: int | None = None,
    checkpoint_every: int = 100,
    log_every: int = 20,
    tensorboard: bool = False,
    progress: bool = True,
    cluster: bool = False,
    heartbeat_timeout: int = 100,
) -> None:
    """Trains a recipe in a folder.

    Args:
        recipe: Recipe to run.
        out: Folder of the run. A run that was stopped resumes there.
        eval_every: Number of steps between evaluations; if None, evaluates only at the end.
        checkpoint_every: Number of steps between checkpoints.
        log_every: Number of steps between records of training metrics.
        tensorboard: Whether to write TensorBoard's files too.
        progress: Whether to display progress.
        cluster: Whether JAX detects the other processes of the run (SLURM, Cloud TPU, ...).
            Otherwise set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
        heartbeat_timeout: Seconds without a sign of life after which a process counts as dead.

    Raises:
        ValueError: If the folder holds a run of another recipe.
    """
    processes.join_processes(cluster=cluster, heartbeat_timeout=heartbeat_timeout)
    experiment = dataclasses.replace(
        recipe.experiment(recipe.load_data()), trained=recipe.trained_variables()
    )
    program = experiment.compile()  # Refuses an indivisible batch before files are made.
    config = LoopConfig(
        steps=experiment.steps,
        log_every=log_every,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        show_progress=progress and processes.is_first_process(),
    )
    _, metrics = experiment.run(
        out,
        config=config,
        program=program,
        tensorboard=tensorboard,
        recipe=recipes.recipe_to_dict(recipe),
    )
    if processes.is_first_process():
        write_json(out / "result.json", metrics)
        rich.print(metric_table(f"{out}: after {experiment.steps} steps", metrics))


if __name__ == "__main__":
    processes.leave(main(sys.argv[1:]))
