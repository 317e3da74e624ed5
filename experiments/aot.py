"""Compiles a recipe's training step for a TPU topology, on any machine.

`python -m experiments.aot RECIPE --topology v5e:16x16 --per-device-batch 1 --json FILE`
"""

import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import rich
import tyro
from rich.table import Table

from experiments._ahead_of_time import HBM_BYTES, Compiled, compile_step, tpu_devices
from experiments._command import run_command
from experiments._config import Baseline, Norm, Recipe, WeightConfig
from experiments._files import write_json
from experiments._recipes import get_recipe
from wsbcn_flax.training import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotOptions:
    """What to compile, and for what.

    Attributes:
        recipe: name of a recipe.
        topology: of TPU chips, {generation}:{grid}.
        per_device_batch: images on each chip.
        micro: images in a micro-batch; the chip's whole batch if None.
        against: normalizations to compile the same network with, without weight standardization:
            none, bn, bn_synced, bn_barrier, gn, ln, in, naive_bcn.
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
    recipe = _for_devices(options, get_recipe(options.recipe), devices)
    others = {name: _with_norm(recipe, name) for name in options.against}
    recipes = {_label(recipe): recipe, **others}
    results: dict[str, Compiled] = {}
    with Progress("compile", total=len(recipes)) as progress:
        for name, recipe in recipes.items():
            results[name] = compile_step(recipe, devices)
            progress.update(len(results), {f"{name} seconds": results[name].compile_seconds})
            if options.json is not None:
                write_json(options.json, {n: result._asdict() for n, result in results.items()})
    rich.print(_table(options, results))
    return results


def _for_devices(options: AotOptions, recipe: Recipe, devices: Sequence[object]) -> Recipe:
    batch = dataclasses.replace(
        recipe.batch,
        size=options.per_device_batch * len(devices),
        micro=options.micro,
        mode=options.mode,
        loop="scan",  # "auto" would ask for this machine's backend.
    )
    model = dataclasses.replace(recipe.model, dtype=options.dtype)
    return dataclasses.replace(recipe, batch=batch, model=model)


def _with_norm(recipe: Recipe, name: str) -> Recipe:
    kind, synced = name.removesuffix("_synced"), name.endswith("_synced")
    kinds = (*typing.get_args(Norm), *typing.get_args(Baseline))
    if kind not in kinds:
        raise ValueError(f"--against takes {', '.join(kinds)}, or bn_synced, received {name!r}.")
    norm = dataclasses.replace(recipe.norm, kind=kind, sync=synced)
    return dataclasses.replace(recipe, norm=norm, weight=WeightConfig(kind="none"))


def _label(recipe: Recipe) -> str:
    """The normalization with its weights, as in the recipe's name: bcn_ws."""
    weight = "" if recipe.weight.kind == "none" else f"_{recipe.weight.kind}"
    return f"{recipe.norm.kind}{weight}"


def _table(options: AotOptions, results: dict[str, Compiled]) -> Table:
    generation = options.topology.partition(":")[0]
    title = f"{options.recipe}, {options.topology}, {options.per_device_batch} images a chip"
    table = Table(title=title)
    table.add_column("normalization")
    for column in ("GB accessed", "temp MB", "peak MB", "of HBM", "all-reduces", "compiled in"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        memory = HBM_BYTES.get(generation)
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
