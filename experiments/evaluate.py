"""Top-1 and top-5 error of a trained model: `python -m experiments.evaluate MODEL`."""

import dataclasses
import sys
from pathlib import Path

import rich
import tyro

from experiments._command import run_command
from experiments._data import load_dataset
from experiments._files import write_json
from experiments._packaged import Packaged, load_model
from experiments._results import metric_table
from wsbcn_flax.training import Partition, Progress, evaluate, make_eval_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate, and on what.

    Attributes:
        model: a run's folder, or a file that `experiments.convert` wrote.
        split: in tfds's syntax; that of the model's recipe if None.
        data_dir: folder of prepared data sets; that of the model's recipe if None.
        batch_size: images at once on each device.
        json: file to write the metrics to.
    """

    model: tyro.conf.Positional[Path]
    split: str | None = None
    data_dir: str | None = None
    batch_size: int = 64
    json: Path | None = None


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(lambda: _evaluate(tyro.cli(EvaluateOptions, args=argv, prog="evaluate")))


def _evaluate(options: EvaluateOptions) -> None:
    metrics = evaluate_model(load_model(options.model), options)
    rich.print(metric_table(f"{options.model}", metrics))
    if options.json is not None:
        write_json(options.json, metrics)


def evaluate_model(packaged: Packaged, options: EvaluateOptions) -> dict[str, float]:
    """Loss and errors over the whole split.

    Raises:
        ValueError: for data whose classes are not the model's.
    """
    changes = {"eval_split": options.split, "data_dir": options.data_dir}
    given = {name: value for name, value in changes.items() if value is not None}
    dataset = load_dataset(dataclasses.replace(packaged.recipe.data, **given))
    if dataset.eval_split.num_classes != len(packaged.class_names):
        raise ValueError(
            f"The model's classes must be the data set's, received {len(packaged.class_names)} and "
            f"{dataset.eval_split.num_classes}."
        )
    partition = Partition(mode="jit")
    step = partition.compile(make_eval_step(packaged.task), donate_state=False)
    size = options.batch_size * partition.mesh.size
    state = partition.place_state(packaged.state)
    total = -(-len(dataset.eval_split) // size)

    def batches(progress):
        for number, batch in enumerate(dataset.eval_batches(batch_size=size), start=1):
            yield partition.place_batch(batch)
            progress.update(number, {})

    with Progress("evaluate", total=total) as progress:
        return evaluate(step, state, batches(progress), transform=packaged.transform)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
