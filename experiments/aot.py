"""Compiles a recipe's training step for a TPU topology, on any machine.

`python -m experiments.aot RECIPE --topology v5e:16x16 --per-device-batch 1 --json FILE`
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import rich
import tyro
from rich.table import Table

from experiments._ahead_of_time import HBM_BYTES, Compiled, compile_steps, tpu_devices
from experiments._command import run_command
from experiments._files import write_json
from experiments._recipes import get_recipe
from experiments._variants import for_devices, norm_name, with_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotOptions:
    """What to compile, and for what.

    Attributes:
        recipe: name of a recipe.
        topology: of TPU chips, {generation}:{grid}.
        per_device_batch: images on each chip.
        micro: images in a micro-batch; the chip's whole batch if None.
        against: normalizations to compile the same network with: none, bn, bn_synced, bn_barrier,
            gn, ln, in, naive_bcn or bcn, without weight standardization or with it: gn_ws.
        mode: how devices are used.
        dtype: of the computation; parameters and statistics are float32.
        json: file to write the figures to.
    """

    recipe: tyro.conf.Positional[str]
    topology: str = "v5e:2x4"
    per_device_batch: int = 1
    micro: int | None = None
    against: tuple[str, ...] = ()
    mode: Literal["shard_map", "jit"] = "shard_map"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    json: Path | None = None


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    # The compiler alone is needed of a TPU; the arrays are this machine's.
    jax.config.update("jax_platforms", "cpu")
    return run_command(lambda: compile_all(tyro.cli(AotOptions, args=argv, prog="aot")))


def compile_all(options: AotOptions) -> dict[str, Compiled]:
    """Compiles the recipe and what it is compared with, and writes the table and the JSON.

    Raises:
        ImportError: if libtpu is missing or does not match.
        ValueError: for an unknown recipe, topology or normalization.
    """
    devices = tpu_devices(options.topology)
    recipe = for_devices(
        get_recipe(options.recipe),
        devices,
        per_device_batch=options.per_device_batch,
        micro=options.micro,
        mode=options.mode,
        dtype=options.dtype,
    )
    others = {name: with_norm(recipe, name) for name in options.against}

    def save(results: Mapping[str, Compiled]) -> None:
        if options.json is not None:
            write_json(options.json, {n: result._asdict() for n, result in results.items()})

    results = compile_steps({norm_name(recipe): recipe, **others}, devices, on_result=save)
    title = f"{options.recipe}, {options.topology}, {options.per_device_batch} images a chip"
    rich.print(compiled_table(results, title=title, topology=options.topology))
    return results


def compiled_table(results: Mapping[str, Compiled], *, title: str, topology: str) -> Table:
    """What the compiler says of the step of each normalization, for one chip."""
    memory = HBM_BYTES.get(topology.partition(":")[0])
    table = Table(title=title)
    table.add_column("normalization")
    for column in ("GB accessed", "temp MB", "peak MB", "of HBM", "all-reduces", "compiled in"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.bytes_accessed / 1e9:.2f}",
            f"{result.temp_bytes / 1e6:.0f}",
            f"{result.peak_bytes / 1e6:.0f}",
            f"{100 * result.peak_bytes / memory:.1f} %" if memory else "?",
            str(result.all_reduces),
            f"{result.compile_seconds:.0f} s",
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
