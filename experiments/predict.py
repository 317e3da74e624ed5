"""Predictions for files: `python -m experiments.predict MODEL IMAGE [IMAGE ...]`."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import rich
import tyro

from experiments._command import run_command
from experiments._model_file import load_model
from experiments._tables import table


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Applies a trained model to files.

    Attributes:
        model: Folder of a run, or a file that `experiments.convert` wrote.
        files: Image files; they are prepared as evaluation prepares them.
        top: Number of predictions to show for each file.
    """

    model: tyro.conf.Positional[Path]
    files: tyro.conf.Positional[tuple[Path, ...]]
    top: int = 5

    def __post_init__(self):
        if not self.files or self.top < 1:
            raise ValueError("predict needs a file and at least one prediction to show.")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(_predict, argv)


def _predict(argv: list[str]) -> None:
    options = tyro.cli(PredictOptions, args=argv, prog="predict")
    model = load_model(options.model)
    read = [model.recipe.read_input(path, model.data) for path in options.files]
    inputs = jax.tree.map(lambda *each: np.stack(each), *read)
    batch = jax.device_get(jax.jit(model.predict_fn())(inputs))
    outputs = [jax.tree.map(lambda x, row=row: x[row], batch) for row in range(len(read))]
    rows = [
        {"file": path.name} | row
        for path, output in zip(options.files, outputs, strict=True)
        for row in model.recipe.describe_output(output, model.data, top=options.top)
    ]
    rich.print(table(f"{options.model}", rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
