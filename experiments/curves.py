"""Test error by epoch of one run or several: `python -m experiments.curves RUN [RUN ...]`."""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import rich
import tyro
from rich.table import Table

from experiments._command import run_command
from experiments._figure import draw_curves, require_matplotlib
from wsbcn_flax.training import read_jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesOptions:
    """What to draw.

    Attributes:
        runs: folders of runs that evaluated on the way (`experiments.train --eval-every`).
        out: the figure.
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
    return run_command(lambda: _draw(tyro.cli(CurvesOptions, args=argv, prog="curves")))


def _draw(options: CurvesOptions) -> None:
    require_matplotlib()
    curves = [read_curve(folder) for folder in options.runs]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw_curves({curve.name: (curve.steps, curve.errors) for curve in curves}, options.out)
    rich.print(_table(curves), f"written to {options.out}")


def read_curve(folder: Path) -> Curve:
    """The evaluations of a run.

    Raises:
        FileNotFoundError: if the folder holds no metrics.
        ValueError: if the run was never evaluated.
    """
    records = [r for r in read_jsonl(folder / "metrics.jsonl") if "eval_error" in r]
    if not records:
        raise ValueError(f"{folder} must hold a run that was evaluated; this one was not yet.")
    errors = [100 * record["eval_error"] for record in records]
    return Curve(folder.name, [record["step"] for record in records], errors)


def _table(curves: list[Curve]) -> Table:
    table = Table(title="test error %")
    for column in ("run", "evaluations", "last", "least"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, _, errors in curves:
        table.add_row(name, str(len(errors)), f"{errors[-1]:.2f}", f"{min(errors):.2f}")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
