"""The command `python -m experiments.bench {layers,ws,step,data}`."""

import sys
from typing import Annotated

import tyro

from experiments import bench
from experiments._command import run_command
from experiments._tables import check_writable
from experiments.bench.data import Data
from experiments.bench.layers import Layers
from experiments.bench.step import Step
from experiments.bench.ws import WeightStandardization
from wsbcn_flax.training.writers import write_json


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(_measure, argv)


def _measure(argv: list[str]) -> None:
    measurement = tyro.cli(
        Annotated[Layers, tyro.conf.subcommand("layers")]
        | Annotated[WeightStandardization, tyro.conf.subcommand("ws")]
        | Annotated[Step, tyro.conf.subcommand("step")]
        | Annotated[Data, tyro.conf.subcommand("data")],
        args=argv,
        prog="bench",
        description=bench.__doc__,
    )
    check_writable(measurement.json)
    document = measurement.measure()
    if measurement.json is not None:
        write_json(measurement.json, document)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
