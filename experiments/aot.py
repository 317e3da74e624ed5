"""Compiles a recipe's training step for a TPU topology or this CPU, without running it.

    python -m experiments.aot RECIPE --topology v5e:16x16 --per-device-batch 1 --against bn
    python -m experiments.aot RECIPE --platform cpu --dtype float32 --per-device-batch 1 2
    python -m experiments.aot RECIPE --per-device-batch 32 --fits 16

A step of a large network takes minutes to compile for TPU.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import rich
import tyro

from experiments._command import run_command
from experiments._recipe import Dtype, Recipe
from experiments._tables import Column, check_writable, table
from experiments._variants import for_devices, norm_name, with_norm
from experiments.recipes import get_recipe
from wsbcn_flax.training.ahead_of_time import (
    HBM_BYTES,
    Compiled,
    compile_lowered,
    device_bytes,
    largest_that_fits,
    tpu_devices,
)
from wsbcn_flax.training.progress import Progress
from wsbcn_flax.training.writers import write_json

_CLOCK = {"v5e": 1.5e9}  # Cycles in a second, where it is known.
_REFERENCES = ("bn", "bn_barrier")
_RATIOS = ("bytes_accessed", "temp_bytes", "total_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotOptions:
    """Compiles a recipe's training step for devices that need not be here.

    Attributes:
        recipe: Name of a recipe.
        platform: Platform to compile for: chips of a topology, or one CPU of this machine.
        topology: TPU chips, {generation}:{grid}.
        per_device_batch: Numbers of images on each chip; one table for each.
        micro: Number of images in a micro-batch; the chip's whole batch if None.
        against: Normalizations to compile the same network with: none, bn, bn_synced, bn_barrier,
            gn, ln, in, naive_bcn or bcn, without weight standardization or with it: gn_ws.
        mode: How devices are used.
        dtype: Computation dtype; parameters and statistics are float32.
        remat: Whether residual blocks are rematerialized.
        compiler_options: Options of XLA, names and values in turn.
        fits: Memory of a device in GiB. Finds the largest micro-batch of the batch that fits.
        json: File to write the figures to.
    """

    recipe: tyro.conf.Positional[str]
    platform: Literal["tpu", "cpu"] = "tpu"
    topology: str = "v5e:2x4"
    per_device_batch: tuple[int, ...] = (1,)
    micro: int | None = None
    against: tuple[str, ...] = ()
    mode: Literal["shard_map", "jit"] = "shard_map"
    dtype: Dtype = "bfloat16"
    remat: bool = False
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)
    fits: float | None = None
    json: Path | None = None

    def __post_init__(self):
        if not self.per_device_batch or min(self.per_device_batch) < 1:
            raise ValueError(
                "per_device_batch must be numbers of images, at least 1, received "
                f"{self.per_device_batch}."
            )


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(_aot, argv)


def _aot(argv: list[str]) -> None:
    options = tyro.cli(AotOptions, args=argv, prog="aot")
    check_writable(options.json)
    # The compiler alone is needed of a TPU; the arrays are this machine's.
    jax.config.update("jax_platforms", "cpu")
    on_tpu = options.platform == "tpu"
    devices = tpu_devices(options.topology) if on_tpu else jax.devices("cpu")[:1]
    if options.fits is None:
        _report(options, devices)
    else:
        _report_fit(options, devices)


def compile_all(options: AotOptions, devices: Sequence[Any]) -> dict[int, dict[str, Compiled]]:
    """Compiles every normalization at every batch size, writing the JSON after each.

    Raises:
        ValueError: For an unknown recipe or normalization, or a micro-batch that does not divide.
    """
    recipe = get_recipe(options.recipe)
    # The references first, so that each row has its ratios when it is written.
    named = {name: with_norm(recipe, name) for name in options.against} | {
        norm_name(recipe): recipe
    }
    results: dict[int, dict[str, Compiled]] = {batch: {} for batch in options.per_device_batch}
    with Progress("compile", total=len(results) * len(named)) as progress:
        for batch, name in ((batch, name) for batch in results for name in named):
            progress.note(f"{name}, {batch} images a chip")
            sized = _sized(named[name], options, devices, batch=batch, micro=options.micro)
            lowered, count = sized.experiment().lower(devices), len(devices)
            trips = sized.batch.micro_batches(count).count
            results[batch][name] = compile_lowered(lowered, chips=count, trips=trips)
            progress.update(sum(map(len, results.values())))
            if options.json is not None:
                rows = {
                    str(batch): {name: result._asdict() for name, result in of_batch.items()}
                    for batch, of_batch in results.items()
                }
                write_json(options.json, rows if len(rows) > 1 else next(iter(rows.values())))
    return results


def rows_with_ratios(results: dict[str, Compiled], *, topology: str) -> list[dict[str, Any]]:
    """Returns one row for each normalization, with ratios to bn and bn_barrier if compiled."""
    generation = topology.partition(":")[0]
    rows = []
    for name, result in results.items():
        row: dict[str, Any] = {"norm": name, **result._asdict(), "estimated_ms": None}
        if result.estimated_cycles and generation in _CLOCK:
            row["estimated_ms"] = 1e3 * result.estimated_cycles / _CLOCK[generation]
        row["of_memory"] = result.peak_bytes / HBM_BYTES.get(generation, float("inf"))
        for reference in _REFERENCES:
            if reference in results:
                for field in _RATIOS:
                    base = getattr(results[reference], field)
                    row[f"{field}/{reference}"] = getattr(result, field) / base
        rows.append(row)
    return rows


def _report(options: AotOptions, devices: Sequence[Any]) -> None:
    where = options.topology if options.platform == "tpu" else "the CPU"
    for batch, results in compile_all(options, devices).items():
        columns: dict[str, Column] = {
            "norm": ("norm", str),
            "bytes_accessed": ("GB", lambda x: f"{x / 1e9:.2f}"),
            "estimated_ms": ("est. ms", "{:.2f}".format),
            "temp_bytes": ("temp MB", lambda x: f"{x / 1e6:.0f}"),
            "argument_bytes": ("args MB", lambda x: f"{x / 1e6:.0f}"),
            "total_bytes": ("total MB", lambda x: f"{x / 1e6:.0f}"),
            "all_reduces": ("all-\nreduces", str),
            "compile_seconds": ("compiled\nin s", "{:.0f}".format),
        }
        rows = rows_with_ratios(results, topology=options.topology)
        title = f"{options.recipe}, {where}, {batch} images a chip"
        rich.print(table(title, rows, columns))
        ratios: dict[str, Column] = {"norm": ("norm", str)}
        for reference in (name for name in _REFERENCES if name in results):
            for field in _RATIOS:
                heading = f"{field.partition('_')[0]}\n/ {reference}"
                ratios[f"{field}/{reference}"] = (heading, "{:.2f}".format)
        if len(ratios) > 1:
            rich.print(table("Ratios", rows, ratios))


def _report_fit(options: AotOptions, devices: Sequence[Any]) -> None:
    """Finds and prints the largest micro-batch that fits, for each batch size."""
    recipe, limit = get_recipe(options.recipe), round((options.fits or 0) * 2**30)
    for batch in options.per_device_batch:

        def bytes_needed(micro: int, batch: int = batch) -> int:
            sized = _sized(recipe, options, devices, batch=batch, micro=micro)
            return device_bytes(sized.experiment().lower(devices).compile())

        sizes = [micro for micro in range(1, batch + 1) if batch % micro == 0]
        fit = largest_that_fits(sizes, bytes_needed, limit=limit)
        rows = [
            {"micro-batch": micro, "MiB on each device": f"{needed / 2**20:,.0f}"}
            for micro, needed in sorted(fit.tried.items())
        ]
        rich.print(table(f"{options.recipe}: a micro-batch of {fit.size} fits", rows))


def _sized(
    recipe: Recipe, options: AotOptions, devices: Sequence[Any], *, batch: int, micro: int | None
) -> Recipe:
    sized = for_devices(
        recipe,
        devices,
        per_device_batch=batch,
        # Under jit a micro-batch is spread over the devices.
        micro=micro if micro is None or options.mode != "jit" else micro * len(devices),
        mode=options.mode,
        dtype=options.dtype,
    )
    return dataclasses.replace(
        sized,
        batch=dataclasses.replace(sized.batch, compiler_options=options.compiler_options),
        model=dataclasses.replace(sized.model, remat=options.remat),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
