"""Finds the largest micro-batch of a recipe that a device's memory holds, by compiling its step.

`python -m experiments.fits RECIPE --memory-gib 16 [--topology v5e:2x4]`
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import rich
import tyro
from rich.table import Table

from experiments._ahead_of_time import lower_step, tpu_devices
from experiments._command import run_command
from experiments._config import Recipe
from experiments._recipes import get_recipe
from wsbcn_flax.training import Fit, device_bytes, largest_that_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitsOptions:
    """What must fit, and where.

    Attributes:
        recipe: name of a recipe.
        memory_gib: of a device, in GiB.
        per_device_batch: images on each device in a step; micro-batches are divisors of it.
        topology: of TPU chips, {generation}:{grid}, none of which need be here; this machine's
            devices if None.
        mode: how devices are used.
        dtype: of the computation; parameters and statistics are float32.
        remat: whether residual blocks are rematerialized.
    """

    recipe: tyro.conf.Positional[str]
    memory_gib: float
    per_device_batch: int = 32
    topology: str | None = None
    mode: Literal["shard_map", "jit"] = "shard_map"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    remat: bool = False


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(lambda: _report(tyro.cli(FitsOptions, args=argv, prog="fits")))


def largest_micro_batch(options: FitsOptions) -> Fit:
    """The most images in a micro-batch, on each device, whose step fits.

    Raises:
        ValueError: for an unknown recipe or topology, or if not even one image fits.
    """
    devices = jax.devices() if options.topology is None else tpu_devices(options.topology)
    batch = options.per_device_batch
    return largest_that_fits(
        [micro for micro in range(1, batch + 1) if batch % micro == 0],
        lambda micro: device_bytes(lower_step(_recipe(options, devices, micro), devices).compile()),
        limit=round(options.memory_gib * 2**30),
    )


def _recipe(options: FitsOptions, devices: Sequence[Any], micro: int) -> Recipe:
    recipe = get_recipe(options.recipe)
    batch = dataclasses.replace(
        recipe.batch,
        size=options.per_device_batch * len(devices),
        # Under jit a micro-batch is spread over the devices.
        micro=micro * len(devices) if options.mode == "jit" else micro,
        mode=options.mode,
        loop="scan",  # The others' memory does not shrink with the micro-batch.
    )
    model = dataclasses.replace(recipe.model, dtype=options.dtype, remat=options.remat)
    return dataclasses.replace(recipe, batch=batch, model=model)


def _report(options: FitsOptions) -> None:
    fit = largest_micro_batch(options)
    table = Table(title=f"{options.recipe}: a micro-batch of {fit.size} fits")
    table.add_column("micro-batch", justify="right")
    table.add_column("MiB on each device", justify="right")
    for micro, needed in sorted(fit.tried.items()):
        table.add_row(str(micro), f"{needed / 2**20:,.0f}")
    rich.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
