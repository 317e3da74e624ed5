"""Applies a trained model to files: `python -m experiments.predict MODEL IMAGE [IMAGE ...]`."""

import sys
from pathlib import Path

import jax
import numpy as np
import rich
import tyro

from experiments._command import make_main
from experiments._model_file import load_model
from experiments._tables import table


def predict(
    model: tyro.conf.Positional[Path],
    files: tyro.conf.Positional[tuple[Path, ...]],
    *,
    top: int = 5,
) -> None:
    """Applies a trained model to files.

    Args:
        model: Folder of a run, or a file that `experiments.convert` wrote.
        files: Image files, which are prepared as in evaluation.
        top: Number of predictions to show for each file.
    """
    if not files or top < 1:
        raise ValueError(
            f"predict needs a file and at least one prediction to show, received {len(files)} "
            f"files and --top {top}."
        )
    trained = load_model(model)
    recipe, data = trained.recipe, trained.data
    inputs = [recipe.read_input(path, data) for path in files]
    stacked = jax.tree.map(lambda *each: np.stack(each), *inputs)
    batch = jax.device_get(jax.jit(trained.predict_fn())(stacked))
    outputs = [jax.tree.map(lambda x, row=row: x[row], batch) for row in range(len(files))]
    rows = []
    for path, output in zip(files, outputs, strict=True):
        found = recipe.describe_output(output, data, top=top)
        rows += [{"file": path.name} | row for row in found]
        if not found:
            print(f"{path}: nothing was found.")
    if rows:
        rich.print(table(f"{model}", rows))


main = make_main(predict)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
