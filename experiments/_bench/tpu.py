"""What the compiler for TPU says of a training step with each normalization, without a TPU."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
from rich.console import Console

from experiments._ahead_of_time import Compiled, compile_steps, tpu_devices
from experiments._bench.memory import ratio_to
from experiments._bench.networks import QUICK_RECIPE
from experiments._bench.options import BenchOptions, check_writable, save
from experiments._bench.printing import rows_table, two_decimals
from experiments._recipes import get_recipe
from experiments._variants import for_devices, norm_name, with_norm
from experiments.aot import compiled_table

_REFERENCES = ("bn", "bn_barrier")
_RATIOS = {"bytes_accessed": "bytes", "temp_bytes": "temp", "peak_bytes": "peak"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AheadOfTime(BenchOptions):
    """Bytes, memory and all-reduces of a training step compiled for TPU, about 90 s for each.

    Attributes:
        recipe: name of one; a small network's if ``quick``.
        topology: of TPU chips, {generation}:{grid}.
        per_device_batch: images on each chip; one table for each number.
        against: what else to compile the same network with: {norm}[_synced][_{weight}]. Ratios are
            to bn and to bn_barrier, BatchNorm behind an optimization barrier.
        mode: how devices are used.
        dtype: of the computation; parameters and statistics are float32.
    """

    recipe: str = "imagenet_resnet50_bcn_ws"
    topology: str = "v5e:2x4"
    per_device_batch: tuple[int, ...] = (1, 2, 8)
    against: tuple[str, ...] = _REFERENCES
    mode: Literal["shard_map", "jit"] = "shard_map"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        if not self.per_device_batch or min(self.per_device_batch) < 1:
            raise ValueError(
                "per_device_batch must be numbers of images, at least 1, received "
                f"{self.per_device_batch}."
            )
        recipe = get_recipe(self.recipe)
        for name in self.against:
            with_norm(recipe, name)


def run_ahead_of_time(config: AheadOfTime, console: Console) -> list[dict[str, Any]]:
    """Compiles, prints and returns the rows of ``aot``, writing them after each compilation.

    Raises:
        ImportError: if libtpu is missing or does not match.
        ValueError: for a topology that libtpu does not know.
        OSError: if the file cannot be written.
    """
    check_writable(config.json)
    # The compiler alone is needed of a TPU; the arrays are this machine's.
    jax.config.update("jax_platforms", "cpu")
    devices = tpu_devices(config.topology)
    name = QUICK_RECIPE if config.quick else config.recipe
    recipe = get_recipe(name)
    # The references first, so that each row has its ratios when it is written.
    norms = {norm: with_norm(recipe, norm) for norm in config.against}
    norms[norm_name(recipe)] = recipe
    recipes = {
        (batch, norm): for_devices(
            each, devices, per_device_batch=batch, mode=config.mode, dtype=config.dtype
        )
        for batch in config.per_device_batch
        for norm, each in norms.items()
    }
    results = compile_steps(
        recipes, devices, on_result=lambda results: save(config.json, tpu_rows(config, results))
    )
    rows = tpu_rows(config, results)
    for batch in config.per_device_batch:
        title = f"{name}, {config.topology}, images a chip: {batch}"
        of_batch = {norm: result for (size, norm), result in results.items() if size == batch}
        console.print(compiled_table(of_batch, title=title, topology=config.topology))
    console.print(_ratio_table(rows))
    return rows


def tpu_rows(
    config: AheadOfTime, results: Mapping[tuple[int, str], Compiled]
) -> list[dict[str, Any]]:
    """One row for each batch and normalization, ready for JSON.

    A ratio is null where its reference is not compiled, or not yet.
    """
    return [
        {
            "topology": config.topology,
            "per_device_batch": batch,
            "norm": norm,
            **result._asdict(),
            **{
                f"{short}_ratio_to_{reference}": ratio_to(
                    results.get((batch, reference)), result, field
                )
                for reference in _REFERENCES
                for field, short in _RATIOS.items()
            },
        }
        for (batch, norm), result in results.items()
    ]


def _ratio_table(rows: list[dict[str, Any]]) -> Any:
    figures = {
        f"{short}_ratio_to_{reference}": (f"{short}\n/ {reference}", two_decimals)
        for reference in _REFERENCES
        for short in _RATIOS.values()
    }
    labels = {"per_device_batch": "images", "norm": "norm"}
    return rows_table(rows, title="Ratios, for each chip", labels=labels, figures=figures)
