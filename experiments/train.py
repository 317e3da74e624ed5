"""Trains a recipe: `python -m experiments.train RECIPE [--a.b VALUE ...]`."""

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import rich
import tyro

from experiments._command import run_command
from experiments._config import Recipe
from experiments._files import write_json
from experiments._published import PUBLISHED
from experiments._recipes import get_recipe, recipe_names
from experiments._results import metric_table
from experiments._run import Run
from wsbcn_flax.training import (
    LoopConfig,
    is_first_process,
    join_processes,
    leave,
    on_first_process,
)

_USAGE = """\
usage: python -m experiments.train RECIPE [--a.b VALUE ...]

Trains, evaluates, checkpoints and resumes. `RECIPE --help` lists the options.
Exit status: 0 trained to the end, 1 error, 2 usage, 75 stopped by SIGTERM with a checkpoint (the
same command resumes). If another process of the run died: 1, or 134 by an abort.

Recipes of published results, whose `--help` tells the error to expect and the cost:
{published}

All others, {{data}}_{{model}}_{{norm}}[_{{weight}}]:
{rest}"""


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
        cluster: whether JAX finds the other processes of the run itself (SLURM, Cloud TPU, ...);
            else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them, if any.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
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
        rest = [name for name in recipe_names() if name not in PUBLISHED]
        print(_USAGE.format(published=_indented(PUBLISHED), rest=_indented(rest)))
        return 0 if argv else 2
    return run_command(lambda: _train(*argv))


def _train(name: str, *arguments: str) -> None:
    options = tyro.cli(
        TrainOptions,
        default=TrainOptions(recipe=get_recipe(name)),
        args=arguments,
        prog=f"train {name}",
        description=inspect.getdoc(PUBLISHED[name]) if name in PUBLISHED else None,
    )
    join_processes(cluster=options.cluster, heartbeat_timeout=options.heartbeat_timeout)
    train(options, folder=options.out or Path("runs") / name)


def _indented(names: Iterable[str]) -> str:
    return "\n".join(f"  {name}" for name in names)


def train(options: TrainOptions, *, folder: Path) -> dict[str, float]:
    """Trains in a folder, resuming what is there, and returns the final metrics.

    Raises:
        ValueError: if the folder holds a run of another recipe.
    """
    run = Run.build(options.recipe)
    on_first_process(lambda: _claim(folder, options.recipe))
    config = LoopConfig(
        steps=run.steps,
        log_every=options.log_every,
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        show_progress=options.progress and is_first_process(),
    )
    _, metrics = run.fit_in(folder, config, tensorboard=options.tensorboard)
    if is_first_process():
        write_json(folder / "result.json", metrics)
        rich.print(metric_table(f"{folder}: after {run.steps} steps", metrics))
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


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
