"""Recipes with another normalization."""

import dataclasses
import typing

from experiments._recipe import Baseline, Norm, Recipe, Weight, WeightConfig

_KINDS: tuple[str, ...] = (*typing.get_args(Norm), *typing.get_args(Baseline))
_WEIGHTS: tuple[str, ...] = typing.get_args(Weight)[1:]


def with_norm(recipe: Recipe, name: str) -> Recipe:
    """Returns the recipe with the normalization and the kernel transform that ``name`` names.

    Args:
        recipe: Recipe whose other fields are kept, with the number of groups and the preset of WS.
        name: Name {norm}[_synced][_{weight}], such as bn, bn_synced, naive_bcn or gn_ws.

    Raises:
        ValueError: For an unknown name.
    """
    rest, _, weight = name.rpartition("_")
    rest, weight = (rest, weight) if weight in _WEIGHTS else (name, "none")
    kind, synced = rest.removesuffix("_synced"), rest.endswith("_synced")
    if kind not in _KINDS or (synced and kind not in ("bn", "bcn")):
        raise ValueError(
            f"The normalization must be one of {', '.join(_KINDS)}, bn_synced or bcn_synced, "
            f"optionally followed by one of _{', _'.join(_WEIGHTS)}, received {name!r}."
        )
    return dataclasses.replace(
        recipe,
        norm=dataclasses.replace(recipe.norm, kind=typing.cast(Norm, kind), sync=synced),
        weight=WeightConfig(kind=typing.cast(Weight, weight), preset=recipe.weight.preset),
    )


def norm_name(recipe: Recipe) -> str:
    """Returns the normalization and weights as in the recipe's name, such as bcn_ws."""
    weight = "" if recipe.weight.kind == "none" else f"_{recipe.weight.kind}"
    return f"{recipe.norm.kind}{weight}"
