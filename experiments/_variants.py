"""A recipe with another normalization, or for other devices, to compare what they cost."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal

from experiments._recipe import Baseline, Dtype, Norm, Recipe, Weight, WeightConfig

_KINDS: tuple[str, ...] = (*typing.get_args(Norm), *typing.get_args(Baseline))
_WEIGHTS: tuple[str, ...] = typing.get_args(Weight)[1:]


def with_norm(recipe: Recipe, name: str) -> Recipe:
    """Returns the recipe with the normalization and weight transform that ``name`` gives.

    Args:
        recipe: Recipe to change; it keeps its number of groups and its preset of WS.
        name: Name {norm}[_synced][_{weight}], such as bn, bn_synced, naive_bcn or gn_ws.

    Raises:
        ValueError: For an unknown name.
    """
    rest, _, weight = name.rpartition("_")
    rest, weight = (rest, weight) if weight in _WEIGHTS else (name, "none")
    kind, synced = rest.removesuffix("_synced"), rest.endswith("_synced")
    if kind not in _KINDS:
        raise ValueError(
            f"A normalization is one of {', '.join(_KINDS)}, or bn_synced, with _"
            f"{', _'.join(_WEIGHTS)} after it or nothing, received {name!r}."
        )
    return dataclasses.replace(
        recipe,
        norm=dataclasses.replace(recipe.norm, kind=typing.cast(Norm, kind), sync=synced),
        weight=WeightConfig(kind=typing.cast(Weight, weight), preset=recipe.weight.preset),
    )


def norm_name(recipe: Recipe) -> str:
    """Returns the normalization with its weights, as in the recipe's name: bcn_ws."""
    weight = "" if recipe.weight.kind == "none" else f"_{recipe.weight.kind}"
    return f"{recipe.norm.kind}{weight}"


def for_devices(
    recipe: Recipe,
    devices: Sequence[Any],
    *,
    per_device_batch: int,
    micro: int | None = None,
    mode: Literal["shard_map", "jit"] = "shard_map",
    dtype: Dtype,
) -> Recipe:
    """Returns the recipe for other devices to compile its step for; none need be here.

    Args:
        recipe: Recipe to change.
        devices: Devices; only their number matters.
        per_device_batch: Number of images on each.
        micro: Number of images in a micro-batch; the device's whole batch if None.
        mode: How devices are used; see ``Partition``.
        dtype: Computation dtype.
    """
    batch = dataclasses.replace(
        recipe.batch,
        size=per_device_batch * len(devices),
        micro=micro,
        mode=mode,
        loop="scan",  # "auto" would ask for this machine's backend.
    )
    model = dataclasses.replace(recipe.model, dtype=dtype)
    return dataclasses.replace(recipe, batch=batch, model=model)
