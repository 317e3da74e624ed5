"""Metrics of a trained model, such as top-1 error: `python -m experiments.evaluate MODEL`."""

import dataclasses
import sys
from pathlib import Path

import jax
import rich
import tyro

from experiments._command import run_command
from experiments._model_file import TrainedModel, load_model
from experiments._tables import metric_table
from wsbcn_flax.training import BatchConfig
from wsbcn_flax.training.writers import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluates a trained model on a split of its dataset.

    Attributes:
        model: Folder of a run, or a file that `experiments.convert` wrote.
        split: Split in the syntax of tensorflow-datasets; that of the model's recipe if None.
        data_dir: Folder of datasets; that of the model's recipe if None.
        batch_size: Number of samples at once on each device.
        json: File to write the metrics to.
    """

    model: tyro.conf.Positional[Path]
    split: str | None = None
    data_dir: str | None = None
    batch_size: int = 64
    json: Path | None = None


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(_evaluate, argv)


def _evaluate(argv: list[str]) -> None:
    options = tyro.cli(EvaluateOptions, args=argv, prog="evaluate")
    metrics = evaluate_model(load_model(options.model), options)
    rich.print(metric_table(f"{options.model}", metrics))
    if options.json is not None:
        write_json(options.json, metrics)


def evaluate_model(model: TrainedModel, options: EvaluateOptions) -> dict[str, float]:
    """Returns the metrics over the whole split.

    Raises:
        ValueError: For data whose classes are not the model's.
    """
    changes = {"eval_split": options.split, "data_dir": options.data_dir}
    given = {name: value for name, value in changes.items() if value is not None}
    recipe = dataclasses.replace(
        model.recipe,
        data=dataclasses.replace(model.recipe.data, **given),
        batch=BatchConfig(size=options.batch_size * jax.device_count(), mode="jit"),
    )
    experiment = dataclasses.replace(model, recipe=recipe).experiment
    program = experiment.compile()
    state = program.partition.place_state(model.state)
    return experiment.evaluate(program, state, show_progress=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
