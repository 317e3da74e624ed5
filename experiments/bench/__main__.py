"""The command `python -m experiments.bench {layers,ws,step,data,detection}`."""

import sys

import tyro

from experiments import bench
from experiments._command import run_command
from experiments._tables import check_writable, machine_facts
from experiments.bench._timing import Measurement
from experiments.bench.data import Data
from experiments.bench.detection import Detection
from experiments.bench.layers import Layers
from experiments.bench.step import Step
from experiments.bench.ws import WeightStandardization
from wsbcn_flax.training.writers import write_json

_MEASUREMENTS = {
    "layers": Layers,
    "ws": WeightStandardization,
    "step": Step,
    "data": Data,
    "detection": Detection,
}


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(_measure, argv)


def _measure(argv: list[str]) -> None:
    measurement: Measurement = tyro.extras.subcommand_cli_from_dict(
        _MEASUREMENTS, args=argv, prog="python -m experiments.bench", description=bench.__doc__
    )
    check_writable(measurement.json)
    print(machine_facts())
    document = measurement.measure()
    if measurement.json is not None:
        write_json(measurement.json, document)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
