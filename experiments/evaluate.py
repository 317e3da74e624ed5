"""Evaluates a trained model: `python -m experiments.evaluate MODEL`."""

import dataclasses
import sys
from pathlib import Path

import jax
import rich
import tyro

from experiments._command import make_main
from experiments._model_file import load_model
from experiments._tables import check_writable, metric_table
from wsbcn_flax.training import BatchConfig
from wsbcn_flax.training.writers import write_json


def evaluate(
    model: tyro.conf.Positional[Path],
    *,
    split: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 64,
    json: Path | None = None,
    results: str | None = None,
) -> None:
    """Evaluates a trained model on a split of its dataset.

    Args:
        model: Folder of a run, or a file that `experiments.convert` wrote.
        split: Split in the syntax of tensorflow-datasets; the recipe's if None.
        data_dir: Folder of datasets; the recipe's if None.
        batch_size: Number of samples in a batch, on each device.
        json: File to write the metrics to.
        results: File to write a detector's detections to, in COCO's format for results.

    Raises:
        ValueError: For data whose classes are not the model's, or ``results`` for no detector.
    """
    trained = load_model(model)
    changes = {"eval_split": split, "data_dir": data_dir, "results": results}
    given = {name: value for name, value in changes.items() if value is not None}
    if results is not None and not hasattr(trained.recipe.data, "results"):
        raise ValueError(
            "--results is for detectors, received a model of another task; --json writes metrics."
        )
    for option, file in {"--json": json, "--results": results and Path(results)}.items():
        check_writable(file, option=option)
    data = dataclasses.replace(trained.recipe.data, **given)
    recipe = dataclasses.replace(trained.recipe, data=data)
    experiment = dataclasses.replace(
        dataclasses.replace(trained, recipe=recipe).experiment,
        batch=BatchConfig(size=batch_size * jax.device_count(), mode="jit"),
    )
    program = experiment.compile()
    state = program.partition.place_state(trained.state)
    metrics = experiment.evaluate(program, state, show_progress=True)
    rich.print(metric_table(f"{model}", metrics))
    if json is not None:
        write_json(json, metrics)


main = make_main(evaluate)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
