"""What the compiler allots to a training step on this machine's CPU, with each normalization."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

from experiments._ahead_of_time import Compiled, compile_steps
from experiments._bench.networks import NORMS, QUICK_RECIPE, recipes_with_norms
from experiments._bench.options import BenchOptions, check_writable, save
from experiments._bench.printing import in_units_of, rows_table, two_decimals
from experiments._config import Recipe
from experiments._variants import for_devices

_BYTES = ("temp_bytes", "argument_bytes", "peak_bytes", "total_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(BenchOptions):
    """Memory of a training step compiled for the CPU in float32, which is not run.

    Attributes:
        recipe: name of one; a small network's if ``quick``.
        norms: {norm}[_{weight}] as in a recipe's name; bn among them.
        micro_batches: images in a step that is one micro-batch.
        compact: whether the compiler orders operations by memory, as ``--batch.compact`` trains.
    """

    recipe: str = "imagenet_resnet50_bcn_ws"
    norms: tuple[str, ...] = NORMS
    micro_batches: tuple[int, ...] = (1, 2)
    compact: bool = False

    def __post_init__(self):
        if not self.micro_batches or min(self.micro_batches) < 1:
            raise ValueError(
                "micro_batches must be numbers of images, at least 1, received "
                f"{self.micro_batches}."
            )
        recipes_with_norms(self.recipe, self.norms)


def run_memory(config: Memory, console: Console) -> list[dict[str, Any]]:
    """Compiles, prints and returns the rows of ``memory``, writing them after each compilation.

    Raises:
        OSError: if the file cannot be written.
    """
    check_writable(config.json)
    devices = jax.devices("cpu")[:1]
    name = QUICK_RECIPE if config.quick else config.recipe
    recipes = {
        (micro, norm): _ordered(
            for_devices(recipe, devices, per_device_batch=micro, dtype="float32"), config
        )
        for micro in config.micro_batches
        for norm, recipe in recipes_with_norms(name, config.norms).items()
    }
    results = compile_steps(
        recipes, devices, on_result=lambda results: save(config.json, memory_rows(results))
    )
    rows = memory_rows(results)
    megabytes = in_units_of(1e6, decimals=1)
    order = "the CPU, compact" if config.compact else "the CPU"
    console.print(
        rows_table(
            rows,
            title=f"Memory of a step of {name}, compiled by jax {jax.__version__} for {order}",
            labels={"micro_batch": "images", "norm": "norm"},
            figures={
                "temp_bytes": ("temp MB", megabytes),
                "temp_ratio_to_bn": ("/ bn's", two_decimals),
                "argument_bytes": ("arguments MB", megabytes),
                "argument_ratio_to_bn": ("/ bn's", two_decimals),
                # Not the peak, which for CPU leaves the temporaries out.
                "total_bytes": ("total MB", megabytes),
                "total_ratio_to_bn": ("/ bn's", two_decimals),
            },
        )
    )
    return rows


def _ordered(recipe: Recipe, config: Memory) -> Recipe:
    return dataclasses.replace(
        recipe, batch=dataclasses.replace(recipe.batch, compact=config.compact)
    )


def memory_rows(results: Mapping[tuple[int, str], Compiled]) -> list[dict[str, Any]]:
    """One row for each micro-batch and normalization, ready for JSON.

    A ratio is null where bn of the same micro-batch is not compiled yet.
    """
    rows = []
    for (micro_batch, norm), result in results.items():
        row: dict[str, Any] = {"micro_batch": micro_batch, "norm": norm}
        for field in _BYTES:
            row[field] = getattr(result, field)
            ratio = ratio_to(results.get((micro_batch, "bn")), result, field)
            row[field.replace("_bytes", "_ratio_to_bn")] = ratio
        rows.append(row)
    return rows


def ratio_to(reference: Compiled | None, result: Compiled, field: str) -> float | None:
    """A figure of one compiled step over another's, None if that is not known."""
    if reference is None:
        return None
    return getattr(result, field) / getattr(reference, field)
