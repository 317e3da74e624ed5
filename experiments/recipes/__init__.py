"""Recipes by name: ``{data}_{model}_{norm}[_{weight}]``."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any

from experiments._classification import ClassificationRecipe
from experiments._detection import PUBLISHED_FACTS, DetectionRecipe
from experiments._image_data import SIZES
from experiments._recipe import (
    DataConfig,
    ModelConfig,
    Norm,
    NormConfig,
    Recipe,
    Weight,
    WeightConfig,
)
from experiments.recipes import cifar, coco, imagenet, scenes, small
from wsbcn_flax.training import BatchConfig

PUBLISHED = imagenet.PUBLISHED | cifar.PUBLISHED | coco.PUBLISHED

_NORMS: tuple[Norm, ...] = typing.get_args(Norm)
_WEIGHTS: tuple[Weight, ...] = typing.get_args(Weight)[1:]
_DATA = {
    **small.DATA,
    "cifar10": DataConfig(name="cifar10", crop_padding=4, flip=True),
    "cifar100": DataConfig(name="cifar100", crop_padding=4, flip=True),
    "imagenet": DataConfig(name="imagenet", eval_split="validation"),
}
MODELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(small.DATA, small.MODELS),
    "cifar10": tuple(cifar.TRAININGS),
    "cifar100": tuple(cifar.TRAININGS),
    "imagenet": tuple(imagenet.TRAININGS),
    "coco": tuple(coco.SCHEDULES),
    "scenes": scenes.MODELS,
}
_NAME = re.compile(rf"({'|'.join(MODELS)})_(.+)_({'|'.join(_NORMS)})(?:_({'|'.join(_WEIGHTS)}))?")


def recipe_names() -> tuple[str, ...]:
    """Returns the names of all recipes."""
    weights = ("", *(f"_{weight}" for weight in _WEIGHTS))
    return tuple(
        f"{data}_{model}_{norm}{weight}"
        for data, models in MODELS.items()
        for model in models
        for norm in _NORMS
        for weight in weights
    )


def get_recipe(name: str) -> Recipe:
    """Returns the recipe of that name.

    Raises:
        ValueError: For an unknown name; it lists the nearest.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in MODELS[match[1]]:
        near = difflib.get_close_matches(name, recipe_names(), n=3) or recipe_names()[:3]
        raise ValueError(
            f"A recipe is named {{data}}_{{model}}_{{norm}}[_{{weight}}], received {name!r}. "
            f"{describe_names(separator='; ')}. The nearest: {', '.join(near)}."
        )
    data, model, norm, weight = match.groups()
    kind = typing.cast(Weight, weight or "none")
    if data in PUBLISHED_FACTS:
        family = coco if data == "coco" else scenes
        norm_config = NormConfig(kind=typing.cast(Norm, norm))
        return family.make_recipe(model, norm_config, WeightConfig(kind=kind))
    if data in small.DATA:
        return ClassificationRecipe(
            data=_DATA[data],
            model=ModelConfig(name=model, stem_strides=small.STEM_STRIDES.get(data)),
            norm=NormConfig(kind=typing.cast(Norm, norm)),
            weight=WeightConfig(kind=kind),
        )
    training = (imagenet.TRAININGS if data == "imagenet" else cifar.TRAININGS)[model]
    # The authors' two ImageNet codes differ in their convention of WS.
    preset = "official" if data == "imagenet" and norm == "gn" else "bcn"
    return ClassificationRecipe(
        data=_DATA[data],
        model=ModelConfig(name=model),
        norm=NormConfig(kind=typing.cast(Norm, norm), groups=training.groups),
        weight=WeightConfig(kind=kind, preset=preset),
        batch=BatchConfig(size=training.batch, loop="auto"),
        optim=training.optim,
        epochs=training.epochs,
    )


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
    """Describes a recipe: its published result if it has one, and its cost."""
    recipe = get_recipe(name)
    sizes = {name: size.train_size for name, size in SIZES.items()}
    sizes |= {name: facts["train_size"] for name, facts in PUBLISHED_FACTS.items()}
    steps = round(recipe.epochs * (sizes[recipe.data.name] // recipe.batch.size))
    lines = [f"{steps:,} steps of {recipe.batch.size} images."]
    for published, row in PUBLISHED.items():
        if _data_and_model(published) == _data_and_model(name):
            if row.flops is not None:
                lines.append(f"FLOPs of the convolutions: {row.flops:.1e}.")
            if published == name:
                lines.append(f"Expected error: {row.error} ({row.source}).")
            else:
                lines.append(f"Expected error: no verified number; {published}: {row.error}.")
    return " ".join(lines)


def _data_and_model(name: str) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    assert match is not None
    return match[1], match[2]


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
        ValueError: For values that are not a recipe's, such as those of another version.
    """
    values = dict(values)
    try:
        return _from_dict(_TASKS[values.pop("task")], values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"A recipe needs the fields of this version, received others ({error}): was it written "
            "by another version of this package?"
        ) from error


def _from_dict(kind: Any, value: Any) -> Any:
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        return _tuples(value) if typing.get_origin(kind) is tuple else value
    hints = typing.get_type_hints(kind)
    if unknown := set(value) - set(hints):
        raise KeyError(f"unknown: {', '.join(unknown)}")
    return kind(**{name: _from_dict(hints[name], item) for name, item in value.items()})


def _tuples(value: Any) -> Any:
    """Returns lists, which JSON has in the place of tuples, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
