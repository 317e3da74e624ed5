"""The recipes by name: every combination of data, network, normalization and weights.

Those that repeat a published result are documented in `experiments._published`.
"""

import difflib
import functools
import itertools
import typing

from experiments._config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    Norm,
    NormConfig,
    Recipe,
    Weight,
    WeightConfig,
)
from experiments._training import CIFAR, IMAGENET

_DATA = {
    "mnist5k": DataConfig(name="mnist5k", crop_padding=1),
    "digits": DataConfig(name="digits", crop_padding=1),
    "fashion": DataConfig(name="fashion_mnist", flip=True),
    "cifar10": DataConfig(name="cifar10", crop_padding=4, flip=True),
    "cifar100": DataConfig(name="cifar100", crop_padding=4, flip=True),
    "imagenet": DataConfig(name="imagenet", eval_split="validation"),
}
_SMALL = ("resnet8", "resnet20")
_MODELS = {
    "mnist5k": _SMALL,
    "digits": _SMALL,
    "fashion": _SMALL,
    "cifar10": tuple(CIFAR),
    "cifar100": tuple(CIFAR),
    "imagenet": tuple(IMAGENET),
}
_NORMS: tuple[Norm, ...] = typing.get_args(Norm)
_WEIGHTS: tuple[Weight, ...] = typing.get_args(Weight)


class _Parts(typing.NamedTuple):
    data: str
    model: str
    norm: Norm
    weight: Weight

    @property
    def name(self) -> str:
        return "_".join(self[:3] if self.weight == "none" else self)


@functools.cache
def _all_parts() -> dict[str, _Parts]:
    parts = (
        _Parts(data, model, norm, weight)
        for data, models in _MODELS.items()
        for model in models
        for norm in _NORMS
        for weight in _WEIGHTS
    )
    return {each.name: each for each in parts}


def recipe_names() -> tuple[str, ...]:
    """All recipes, ``{data}_{model}_{norm}[_{weight}]``."""
    return tuple(_all_parts())


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: for an unknown name; it lists the nearest.
    """
    if name not in _all_parts():
        near = difflib.get_close_matches(name, recipe_names(), n=3) or list(recipe_names()[:3])
        models = dict.fromkeys(itertools.chain(*_MODELS.values()))
        raise ValueError(
            f"A recipe is named {{data}}_{{model}}_{{norm}}[_{{weight}}], received {name!r}. "
            f"Data: {', '.join(_DATA)}; models: {', '.join(models)}; norms: {', '.join(_NORMS)}; "
            f"weights: {', '.join(_WEIGHTS[1:])}. The nearest: {', '.join(near)}."
        )
    parts = _all_parts()[name]
    if parts.model in _SMALL and parts.data in ("mnist5k", "digits", "fashion"):
        return _small(parts)
    training = (IMAGENET if parts.data == "imagenet" else CIFAR)[parts.model]
    # The authors' two ImageNet codes differ in their convention of WS.
    preset = "official" if parts.data == "imagenet" and parts.norm == "gn" else "bcn"
    return Recipe(
        data=_DATA[parts.data],
        model=ModelConfig(name=parts.model),
        norm=NormConfig(kind=parts.norm, groups=training.groups),
        weight=WeightConfig(kind=parts.weight, preset=preset),
        batch=BatchConfig(size=training.batch, loop="auto"),
        optim=training.optim,
        epochs=training.epochs,
    )


def _small(parts: _Parts) -> Recipe:
    """For data of a desktop's size: narrow networks, few epochs, cosine decay."""
    # Digits and garments of 28x28 pixels have little detail: a strided stem costs a quarter.
    stem_strides = None if parts.data == "digits" else 2
    return Recipe(
        data=_DATA[parts.data],
        model=ModelConfig(name=parts.model, stem_strides=stem_strides),
        norm=NormConfig(kind=parts.norm),
        weight=WeightConfig(kind=parts.weight),
    )
