"""Measures what the normalizations cost, as ratios taken side by side.

    python -m experiments.bench layers --json runs/layers.json --against torch
    python -m experiments.bench ws --json runs/ws.json
    python -m experiments.bench step --json runs/step.json --against torch
    python -m experiments.bench data --json runs/data.json
    python -m experiments.bench memory --json runs/memory.json
    python -m experiments.bench aot --json runs/aot.json

The first four take times. Every form runs once per round, in an order that changes, and a ratio is
the median over rounds of two times of the same round. A form's spread is the interquartile range of
its times over their median: measure on a quiet machine, and trust no difference that is small
beside it. PyTorch suffers most from whatever else is running: with other work on both of two cores,
its ResNet-50 step took some thirty times as long as without, ours some two times.

The last two ask the compiler, and give the same on a busy machine: ``memory`` for this CPU, and
``aot`` for a TPU that need not be here, in about 90 s for each step of a ResNet-50.
"""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from rich.console import Console

from experiments._bench.data import Data, run_data
from experiments._bench.layers import Layers, run_layers
from experiments._bench.memory import Memory, run_memory
from experiments._bench.step import Step, run_step
from experiments._bench.tpu import AheadOfTime, run_ahead_of_time
from experiments._bench.weights import WeightStandardization, run_weight_standardization
from experiments._command import run_command

_RUN: dict[type, Callable[[Any, Console], object]] = {
    Layers: run_layers,
    WeightStandardization: run_weight_standardization,
    Step: run_step,
    Memory: run_memory,
    Data: run_data,
    AheadOfTime: run_ahead_of_time,
}


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""

    def measure() -> None:
        config = tyro.cli(
            Annotated[Layers, tyro.conf.subcommand("layers")]
            | Annotated[WeightStandardization, tyro.conf.subcommand("ws")]
            | Annotated[Step, tyro.conf.subcommand("step")]
            | Annotated[Memory, tyro.conf.subcommand("memory")]
            | Annotated[Data, tyro.conf.subcommand("data")]
            | Annotated[AheadOfTime, tyro.conf.subcommand("aot")],
            args=argv,
            prog="bench",
            description=__doc__,
        )
        _RUN[type(config)](config, Console())

    return run_command(measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
