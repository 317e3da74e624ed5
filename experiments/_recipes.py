"""What a run is made of, as frozen dataclasses, and the recipes by name."""

import dataclasses
import difflib
import itertools
from typing import Literal

from wsbcn_flax.training import OptimizerConfig

Norm = Literal["bn", "gn", "ln", "in", "bcn"]
Weight = Literal["none", "ws", "wn", "cwn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on.

    Attributes:
        name: a data set's name, as ``wsbcn_flax.data.dataset_names`` lists them.
        train_split: in tfds's syntax.
        eval_split: in tfds's syntax.
        crop_padding: pixels padded before a random crop to the image's size.
        flip: whether to mirror half of the images.
        data_dir: folder of prepared data sets; a folder in the user's cache if None.
    """

    name: str
    train_split: str = "train"
    eval_split: str = "test"
    crop_padding: int = 2
    flip: bool = False
    data_dir: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A CIFAR-style residual network.

    Attributes:
        depth: 6n + 2.
        width: channels of the first stage.
        stem_strides: of the stem's convolution.
        block: "basic" or "preact" (pre-activation).
        dtype: of the computation.
    """

    depth: int = 8
    width: int = 16
    stem_strides: int = 1
    block: Literal["basic", "preact"] = "basic"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A normalization.

    Attributes:
        kind: batch, group, layer, instance or batch-channel normalization.
        groups: of gn and of bcn's channel part.
        rate: of the running statistics of bn and bcn; one minus Flax's momentum.
        statistics: bcn's, "estimate" or "batch".
        order: bcn's; "normalize_first" makes the step the same however the batch is split.
    """

    kind: Norm = "bcn"
    groups: int = 4
    rate: float = 0.1
    statistics: Literal["estimate", "batch"] = "estimate"
    order: Literal["update_first", "normalize_first"] = "normalize_first"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """What is done to convolution kernels before they are used.

    Attributes:
        kind: nothing, Weight Standardization, or weight or centered weight normalization.
        preset: the convention of "ws": bcn, official, official_tf, bit, timm or nfnet.
    """

    kind: Weight = "none"
    preset: str = "bcn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The global batch and how it is split.

    Attributes:
        size: images in a step, over all devices.
        micro: images in a micro-batch; None for one micro-batch on each device.
        loop: how micro-batches run; see ``wsbcn_flax.training.MicroBatches``.
        batch_stats: "average" or "carry"; see there.
        mode: how devices are used: "shard_map", "jit" or "pmap".
        devices: how many; all if None.
    """

    size: int = 64
    micro: int | None = None
    loop: Literal["auto", "scan", "unroll", "vmap"] = "vmap"
    batch_stats: Literal["average", "carry"] = "average"
    mode: Literal["shard_map", "jit", "pmap"] = "shard_map"
    devices: int | None = None


_OPTIM = OptimizerConfig(learning_rate=0.1, warmup_epochs=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        data: what to train on.
        model: the network.
        norm: its normalization.
        weight: its weight standardization.
        batch: the batch and its split over devices and micro-batches.
        optim: the optimizer and its schedule.
        epochs: length of training.
        seed: of initialization, order and augmentation.
        label_smoothing: probability spread over all classes in the training loss.
    """

    data: DataConfig
    model: ModelConfig = ModelConfig()
    norm: NormConfig = NormConfig()
    weight: WeightConfig = WeightConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimizerConfig = _OPTIM
    epochs: float = 8.0
    seed: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not self.epochs > 0:
            raise ValueError(f"epochs must be positive, received {self.epochs}.")


_DATA = {
    "mnist5k": DataConfig(name="mnist5k", crop_padding=1),
    "digits": DataConfig(name="digits", crop_padding=1),
    "fashion": DataConfig(name="fashion_mnist", flip=True),
    "cifar10": DataConfig(name="cifar10", crop_padding=4, flip=True),
    "cifar100": DataConfig(name="cifar100", crop_padding=4, flip=True),
}
_SMALL = ("mnist5k", "digits", "fashion")
_NORMS: tuple[Norm, ...] = ("bn", "gn", "ln", "in", "bcn")
_WEIGHTS: tuple[Weight, ...] = ("none", "ws", "wn", "cwn")
_MODELS = {
    "resnet8": ModelConfig(depth=8),
    "resnet20": ModelConfig(depth=20),
    "resnet110": ModelConfig(depth=110),
    "preresnet110": ModelConfig(depth=110, block="preact"),
}
# The schedule of the code base the authors forked for CIFAR.
_CIFAR_OPTIM = OptimizerConfig(learning_rate=0.1, schedule="step", milestones=(81.0, 122.0))


def recipe_names() -> tuple[str, ...]:
    """All recipes, ``{data}_{model}_{norm}[_{weight}]``."""
    names = itertools.product(_DATA, _MODELS, _NORMS, _WEIGHTS)
    return tuple(
        "_".join(parts if parts[-1] != "none" else parts[:-1])
        for parts in names
        if not (parts[0] in _SMALL and "110" in parts[1])
    )


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: for an unknown name; it lists the nearest.
    """
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=3) or list(recipe_names()[:3])
        raise ValueError(
            f"A recipe is named {{data}}_{{model}}_{{norm}}[_{{weight}}], received {name!r}. "
            f"Data: {', '.join(_DATA)}; models: {', '.join(_MODELS)}; norms: {', '.join(_NORMS)}; "
            f"weights: {', '.join(_WEIGHTS[1:])}. The nearest: {', '.join(near)}."
        )
    data, model, norm, weight = (*name.split("_"), "none")[:4]
    # Digits and garments of 28x28 pixels have little detail: a strided stem costs a quarter.
    stem_strides = 2 if data in ("mnist5k", "fashion") else 1
    recipe = Recipe(
        data=_DATA[data],
        model=dataclasses.replace(_MODELS[model], stem_strides=stem_strides),
        norm=NormConfig(kind=_as(norm, _NORMS)),
        weight=WeightConfig(kind=_as(weight, _WEIGHTS)),
    )
    if data in _SMALL:
        return recipe
    return dataclasses.replace(
        recipe, epochs=164.0, optim=_CIFAR_OPTIM, batch=BatchConfig(size=128, loop="auto")
    )


def _as(value: str, choices):
    """``value`` with the choices' own type."""
    return choices[choices.index(value)]
