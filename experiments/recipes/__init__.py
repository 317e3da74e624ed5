"""Recipes by name: ``{data}_{model}_{norm}[_{weight}]``."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from experiments._classification import ClassificationRecipe
from experiments._detection import COCO_FACTS, DetectionRecipe
from experiments._image_data import PUBLISHED_FACTS
from experiments._recipe import Norm, Recipe, Weight, WeightConfig, from_json
from experiments._variants import with_norm
from experiments.recipes import cifar, coco, imagenet, scenes, small

PUBLISHED = imagenet.PUBLISHED | cifar.PUBLISHED | coco.PUBLISHED

_NORMS: tuple[str, ...] = typing.get_args(Norm)
_WEIGHTS: tuple[str, ...] = typing.get_args(Weight)[1:]
_FAMILIES = (small, cifar, imagenet, coco, scenes)
_RECIPES: list[Recipe] = [recipe for family in _FAMILIES for recipe in family.RECIPES]
# Recipes by name, each with the name of the normalization to give it.
_NAMES: dict[str, tuple[Recipe, str]] = {
    f"{recipe.data.name}_{recipe.model.name}_{norm}{weight}": (recipe, f"{norm}{weight}")
    for recipe in _RECIPES
    for norm in _NORMS
    for weight in ("", *(f"_{weight}" for weight in _WEIGHTS))
}
_TRAIN_SIZES = {name: facts.train_size for name, facts in PUBLISHED_FACTS.items()} | {
    name: facts["train_size"] for name, facts in COCO_FACTS.items()
}
MODELS: dict[str, tuple[str, ...]] = {}
for _recipe in _RECIPES:
    MODELS[_recipe.data.name] = (*MODELS.get(_recipe.data.name, ()), _recipe.model.name)


def recipe_names() -> tuple[str, ...]:
    """Returns the names of all recipes."""
    return tuple(_NAMES)


def get_recipe(name: str) -> Recipe:
    """Returns the recipe of that name.

    Raises:
        ValueError: For an unknown name; the message lists the nearest names.
    """
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=3) or recipe_names()[:3]
        raise ValueError(
            f"A recipe is named {{data}}_{{model}}_{{norm}}[_{{weight}}], received {name!r}. Did "
            f"you mean {', '.join(near)}? `python -m experiments.train --help` lists all."
        )
    recipe, norm = _NAMES[name]
    if recipe.data.name == "imagenet" and norm.startswith("gn"):
        # The authors' two ImageNet codes differ in their convention of WS.
        recipe = dataclasses.replace(recipe, weight=WeightConfig(preset="official"))
    return with_norm(recipe, norm)


def describe_names(*, separator: str) -> str:
    """Says which models go with which data, and lists norms and weights."""
    together: dict[tuple[str, ...], list[str]] = {}
    for data, models in MODELS.items():
        together.setdefault(models, []).append(data)
    parts = [f"{', '.join(data)}: {', '.join(models)}" for models, data in together.items()]
    return separator.join(
        [*parts, f"norms: {', '.join(_NORMS)}", f"weights: {', '.join(_WEIGHTS)}"]
    )


def describe(name: str) -> str:
    """Describes a recipe's cost, and its published result if there is one."""
    recipe = get_recipe(name)
    train_size = _TRAIN_SIZES[recipe.data.name]
    steps = round(recipe.epochs * (train_size // recipe.batch.size))
    lines = [f"{steps:,} steps of {recipe.batch.size} images."]
    for published, row in PUBLISHED.items():
        if published.startswith(f"{recipe.data.name}_{recipe.model.name}_"):
            if row.flops is not None:
                lines.append(f"FLOPs of the convolutions: {row.flops:.1e}.")
            if published == name:
                lines.append(f"Expected result: {row.result} ({row.source}).")
            else:
                lines.append(f"Expected result: no verified number; {published}: {row.result}.")
    return " ".join(lines)


_TASKS: dict[str, type[Recipe]] = {
    "classification": ClassificationRecipe,
    "detection": DetectionRecipe,
}


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns a recipe as JSON values."""
    (task,) = (name for name, kind in _TASKS.items() if type(recipe) is kind)
    return {"task": task, **dataclasses.asdict(recipe)}


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Returns the recipe that `recipe_to_dict` turned into ``values``.

    Raises:
        ValueError: For values that are not a recipe's, such as values of another version.
    """
    values = dict(values)
    try:
        return from_json(_TASKS[values.pop("task")], values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"A recipe needs the fields of this version, received others ({error}): was it written "
            "by another version of this package?"
        ) from error
