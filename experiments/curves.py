"""Draws the test error of runs by step: `python -m experiments.curves RUN [RUN ...]`."""

import sys
from pathlib import Path
from typing import NamedTuple

import rich
import tyro

from experiments._command import make_main
from experiments._figures import error_figure
from experiments._tables import check_writable, table
from wsbcn_flax.training.writers import read_jsonl


class Curve(NamedTuple):
    """A run's test error, in percent, at the steps where it was evaluated."""

    name: str
    steps: list[int]
    errors: list[float]


def curves(
    runs: tyro.conf.Positional[tuple[Path, ...]], *, out: Path = Path("runs/curves.png")
) -> None:
    """Draws the test error of runs by step.

    Args:
        runs: Folders of runs that were evaluated during training
            (`experiments.train --eval-every`).
        out: File to write the figure to.
    """
    if not runs:
        raise ValueError("curves needs at least one folder of a run, received none.")
    check_writable(out, option="--out", figure=True)
    rows = []
    with error_figure(out, xlabel="step") as axes:
        for name, steps, errors in map(read_curve, runs):
            axes.plot(steps, errors, marker="o", label=f"{name}: {errors[-1]:.2f} %")
            last, best = f"{errors[-1]:.2f}", f"{min(errors):.2f}"
            rows.append({"run": name, "evaluations": len(errors), "last": last, "best": best})
    rich.print(table("test error %", rows), f"written to {out}")


def read_curve(folder: Path) -> Curve:
    """Reads the evaluations of a run.

    Raises:
        FileNotFoundError: If the folder holds no metrics.
        ValueError: If the run was never evaluated.
    """
    records = [r for r in read_jsonl(folder / "metrics.jsonl") if "eval_error" in r]
    if not records:
        raise ValueError(f"{folder} must hold evaluations, received none; train with --eval-every.")
    errors = [100 * record["eval_error"] for record in records]
    return Curve(folder.name, [record["step"] for record in records], errors)


main = make_main(curves)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
