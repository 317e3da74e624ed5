"""Test error by epoch of one run or several: `python -m experiments.curves RUN [RUN ...]`."""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import rich
import tyro

from experiments._command import run_command
from experiments._figures import draw_curves, require_matplotlib
from experiments._tables import table
from wsbcn_flax.training.writers import read_jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesOptions:
    """Draws the test error of runs by step.

    Attributes:
        runs: Folders of runs that were evaluated during training
            (`experiments.train --eval-every`).
        out: File of the figure.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("runs/curves.png")


class Curve(NamedTuple):
    """A run's test error, in percent, at the steps where it was evaluated."""

    name: str
    steps: list[int]
    errors: list[float]


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(lambda argv: _draw(tyro.cli(CurvesOptions, args=argv)), argv)


def _draw(options: CurvesOptions) -> None:
    require_matplotlib()
    curves = [read_curve(folder) for folder in options.runs]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw_curves({curve.name: (curve.steps, curve.errors) for curve in curves}, options.out)
    rows = [
        {
            "run": name,
            "evaluations": len(errors),
            "last": f"{errors[-1]:.2f}",
            "best": f"{min(errors):.2f}",
        }
        for name, _, errors in curves
    ]
    rich.print(table("test error %", rows), f"written to {options.out}")


def read_curve(folder: Path) -> Curve:
    """Reads the evaluations of a run.

    Raises:
        FileNotFoundError: If the folder holds no metrics.
        ValueError: If the run was never evaluated.
    """
    records = [r for r in read_jsonl(folder / "metrics.jsonl") if "eval_error" in r]
    if not records:
        raise ValueError(f"{folder} must hold a run that was evaluated; this one was not yet.")
    errors = [100 * record["eval_error"] for record in records]
    return Curve(folder.name, [record["step"] for record in records], errors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
