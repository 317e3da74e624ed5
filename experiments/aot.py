"""Compiles a recipe's training step for TPUs, GPUs or this CPU, without running it.

    python -m experiments.aot RECIPE --topology v5e:16x16 --per-device-batch 1 --against bn
    python -m experiments.aot RECIPE --platform cpu --dtype float32 --per-device-batch 1 2
    python -m experiments.aot RECIPE --platform cuda --target h100 --per-device-batch 2
    python -m experiments.aot RECIPE --per-device-batch 32 --fits 16

A step of a large network takes minutes to compile for TPU.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import rich
import tyro

from experiments._command import make_main
from experiments._recipe import Dtype, Recipe
from experiments._tables import Column, check_writable, table
from experiments._variants import norm_name, with_norm
from experiments.recipes import get_recipe
from wsbcn_flax.training.ahead_of_time import (
    CHIPS,
    Chip,
    Group,
    compile_lowered,
    device_bytes,
    gpu_devices,
    largest_that_fits,
    tpu_devices,
)
from wsbcn_flax.training.progress import Progress
from wsbcn_flax.training.writers import write_json

Figures = dict[str, Any]  # The fields of `Compiled`.

_REFERENCES = ("bn", "bn_barrier")
_RATIOS = (
    "bytes_accessed",
    "estimated_ms",
    "small_operations",
    "fusions",
    "temp_bytes",
    "total_bytes",
)
_PROFILED = 24  # Number of modules that are listed.
_COLUMNS: dict[str, Column] = {
    "norm": ("norm", str),
    "bytes_accessed": ("GB", lambda x: f"{x / 1e9:.2f}"),
    "estimated_ms": ("est.\nms", "{:.2f}".format),
    "operations": ("oper-\nations", str),
    "small_operations": ("small\nones", str),
    "small_ms": ("their\nms", "{:.2f}".format),
    "custom_calls": ("custom\ncalls", str),
    "fusions": ("fusions", str),
    "library_calls": ("library\ncalls", str),
    "temp_bytes": ("temp\nMB", lambda x: f"{x / 1e6:.0f}"),
    "total_bytes": ("total\nMB", lambda x: f"{x / 1e6:.0f}"),
    "all_reduces": ("all-\nre-\nduces", str),
    "compile_seconds": ("com-\npile\ns", "{:.0f}".format),
}


def aot(
    recipe: tyro.conf.Positional[str],
    *,
    platform: Literal["tpu", "cuda", "cpu"] = "tpu",
    topology: str = "v5e:2x4",
    target: Literal["h100", "a100"] = "h100",
    per_device_batch: tuple[int, ...] = (1,),
    micro: int | None = None,
    against: tuple[str, ...] = (),
    mode: Literal["shard_map", "jit"] = "shard_map",
    dtype: Dtype = "bfloat16",
    remat: bool = False,
    reduce_dtype: Literal["bfloat16"] | None = None,
    compiler_options: dict[str, str] | None = None,
    fits: float | None = None,
    profile: bool = False,
    json: Path | None = None,
) -> None:
    """Compiles a recipe's training step for devices that need not be present.

    Args:
        recipe: Name of a recipe.
        platform: Platform to compile for: TPU chips of a topology, 8 GPUs, or one CPU of this
            machine.
        topology: TPU chips, {generation}:{grid}.
        target: Kind of GPU, for ``--platform cuda``.
        per_device_batch: Numbers of images on each chip; one table for each.
        micro: Number of images in a micro-batch; the chip's whole batch if None.
        against: Normalizations to compile the same network with: none, bn, bn_synced, bn_barrier,
            gn, ln, in, naive_bcn or bcn. With weight standardization append _ws, as in gn_ws.
        mode: Use of devices: a share of the batch on each (shard_map), or global arrays (jit).
        dtype: Computation dtype; parameters and statistics are float32.
        remat: Whether residual blocks are computed again in the backward pass.
        reduce_dtype: Dtype in which devices add up gradients; their own if None.
        compiler_options: Options of XLA, as alternating names and values.
        fits: Memory of a device in GiB. If given, only finds the largest micro-batch that fits;
            goes without json, against, micro and profile.
        profile: Whether to list the costliest modules of each step.
        json: File to write the figures to.

    Raises:
        ValueError: For an unknown recipe or normalization, or micro-batches that do not divide.
    """
    if not per_device_batch or min(per_device_batch) < 1:
        raise ValueError(
            f"per_device_batch must be numbers of images, at least 1, received {per_device_batch}."
        )
    others = {"--json": json, "--against": against, "--micro": micro, "--profile": profile}
    if fits is not None and fits <= 0:
        raise ValueError(f"--fits must be a positive number of GiB, received {fits}.")
    if fits is not None and (given := [name for name, value in others.items() if value]):
        raise ValueError(f"--fits goes without {', '.join(others)}, received {', '.join(given)}.")
    if profile and platform != "tpu":
        raise ValueError(f"--profile needs the estimates of --platform tpu, received {platform}.")
    check_writable(json)
    # Compiling for a TPU needs no TPU; this machine's CPU holds the arrays.
    jax.config.update("jax_platforms", "cpu")
    where, find_devices = {
        "tpu": (topology, lambda: tpu_devices(topology)),
        "cuda": (target, lambda: gpu_devices(target)),
        "cpu": ("the CPU", lambda: jax.devices("cpu")[:1]),
    }[platform]
    devices = find_devices()
    chips, base = len(devices), get_recipe(recipe)

    def resized(variant: Recipe, batch: int, micro: int | None) -> Recipe:
        """Returns the recipe with batches of this size on each chip."""
        # Under jit a micro-batch is spread over the chips.
        shares = chips if mode == "jit" else 1
        return dataclasses.replace(
            variant,
            batch=dataclasses.replace(
                variant.batch,
                size=batch * chips,
                micro=None if micro is None else micro * shares,
                mode=mode,
                reduce_dtype=reduce_dtype,
                loop="scan",  # "auto" would choose for this machine's backend.
                compiler_options=compiler_options or {},
            ),
            model=dataclasses.replace(variant.model, dtype=dtype, remat=remat),
        )

    def bytes_needed(batch: int, micro: int) -> int:
        return device_bytes(resized(base, batch, micro).experiment().lower(devices).compile())

    if fits is not None:
        for batch in per_device_batch:
            of_micro = functools.partial(bytes_needed, batch)
            _print_what_fits(recipe, batch, of_micro, limit=round(fits * 2**30))
        return
    # The references come first in the tables.
    variants = {name: with_norm(base, name) for name in against} | {norm_name(base): base}
    figures: dict[int, dict[str, Figures]] = {batch: {} for batch in per_device_batch}
    profiles: dict[tuple[int, str], tuple[Group, ...]] = {}
    chip = CHIPS.get(topology.partition(":")[0]) if platform == "tpu" else None
    with Progress("compile", total=len(figures) * len(variants)) as progress:
        for number, (batch, name) in enumerate(itertools.product(figures, variants), start=1):
            progress.note(f"{name}, batch {batch} a chip")
            variant = resized(variants[name], batch, micro)
            lowered = variant.experiment().lower(devices)
            trips = variant.batch.micro_batches(chips).count
            compiled = compile_lowered(lowered, chips=chips, trips=trips, chip=chip)
            figures[batch][name] = compiled._asdict()
            profiles[batch, name] = figures[batch][name].pop("profile")
            progress.update(number)
            if json is not None:
                write_json(json, figures if len(figures) > 1 else figures[batch])
    for batch, of_batch in figures.items():
        _print_tables(f"{recipe}, {where}, batch {batch} a chip", rows_with_ratios(of_batch))
        if chip is not None and profile:
            for name in of_batch:
                _print_profile(f"{name}, batch {batch} a chip", profiles[batch, name], chip)
    if any(row["custom_calls"] for rows in figures.values() for row in rows.values()):
        rich.print(
            "The compiler does not estimate custom calls. Each counts as 3,000 cycles or as the "
            "time to move its bytes, whichever is longer."
        )


def rows_with_ratios(figures: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """Returns one row for each normalization, with ratios to bn and bn_barrier if compiled too."""
    rows = []
    for name, of_norm in figures.items():
        ratios = {
            f"{field}/{reference}": of_norm[field] / figures[reference][field]
            for reference in _REFERENCES
            if reference in figures
            for field in _RATIOS
            if of_norm[field] is not None
        }
        rows.append({"norm": name, **of_norm, **ratios})
    return rows


def _print_profile(title: str, groups: Sequence[Group], chip: Chip) -> None:
    rows = [
        {
            "module": group.path,
            "est. ms": f"{1e3 * group.cycles / chip.clock:.3f}",
            "operations": group.operations,
            "small ones": group.small_operations,
        }
        for group in groups[:_PROFILED]
    ]
    if rows:
        rich.print(table(f"Costliest modules: {title}", rows))


def _print_tables(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    known = {
        key: shown for key, shown in _COLUMNS.items() if any(row[key] is not None for row in rows)
    }
    rich.print(table(title, rows, known))
    ratios: dict[str, Column] = {
        key: (f"{key.partition('_')[0]}\n/ {key.partition('/')[2]}", "{:.2f}".format)
        for key in rows[0]
        if "/" in key
    }
    if ratios:
        rich.print(table("Ratios", rows, {"norm": ("norm", str), **ratios}))


def _print_what_fits(
    name: str, batch: int, bytes_needed: Callable[[int], int], *, limit: int
) -> None:
    """Finds the largest micro-batch that divides the batch and fits."""
    sizes = [micro for micro in range(1, batch + 1) if batch % micro == 0]
    fit = largest_that_fits(sizes, bytes_needed, limit=limit)
    rows = [
        {"micro-batch": micro, "MiB on each device": f"{needed / 2**20:,.0f}"}
        for micro, needed in sorted(fit.tried.items())
    ]
    rich.print(table(f"{name}: a micro-batch of {fit.size} fits", rows))


main = make_main(aot)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
