"""What a run is made of, as frozen dataclasses."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from wsbcn_flax.training import OptimizerConfig

Norm = Literal["bn", "gn", "ln", "in", "bcn"]
Baseline = Literal["none", "naive_bcn", "bn_barrier"]
Weight = Literal["none", "ws", "wn", "cwn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on.

    Attributes:
        name: "imagenet", or one of ``wsbcn_flax.data.dataset_names``.
        train_split: in tfds's syntax.
        eval_split: in tfds's syntax.
        crop_padding: pixels padded before a random crop to the image's size; ImageNet's crops are
            random-resized instead.
        flip: whether to mirror half of the images; ImageNet's always are.
        image_size: side of ImageNet's crops; other images keep their size.
        resize: shorter side that ImageNet's evaluation images are resized to before the crop.
        threads: that make ImageNet's batches.
        data_dir: folder of prepared data sets; a folder in the user's cache if None.
    """

    name: str
    train_split: str = "train"
    eval_split: str = "test"
    crop_padding: int = 2
    flip: bool = False
    image_size: int = 224
    resize: int = 256
    threads: int = 16
    data_dir: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network.

    Attributes:
        name: as in a recipe's name: resnet20, wrn28_10, resnet50, resnext101_32x4d, ...
        width: channels of the stem of a CIFAR residual network; the network's own if None.
        stem_strides: of the stem of a CIFAR residual network; the network's own if None.
        dtype: of the computation; parameters and statistics are float32. "float16" scales the loss.
        remat: whether blocks of residual networks are computed again in the backward pass, to keep
            their inputs in memory and nothing else of them.
    """

    name: str = "resnet8"
    width: int | None = None
    stem_strides: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A normalization.

    Attributes:
        kind: batch, group, layer, instance or batch-channel normalization, or one of the baselines
            in `experiments._baselines`.
        groups: of gn and of bcn's channel part.
        rate: of the running statistics of bn and bcn; one minus Flax's momentum.
        sync: whether bn's batch statistics are those of all devices ("jit" always takes those).
        statistics: bcn's, "estimate" or "batch".
        order: bcn's; "normalize_first" makes the step the same however the batch is split.
        affine: the scale and bias of bcn's channel part, per "group" or per "channel".
    """

    kind: Norm | Baseline = "bcn"
    groups: int = 4
    rate: float = 0.1
    sync: bool = False
    statistics: Literal["estimate", "batch"] = "estimate"
    order: Literal["update_first", "normalize_first"] = "normalize_first"
    affine: Literal["group", "channel"] = "group"


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
        shard_optimizer: whether devices share the optimizer's state out; for mode "jit".
        compact: whether a CPU holds less memory at the price of some time; not for mode "pmap".
    """

    size: int = 64
    micro: int | None = None
    loop: Literal["auto", "scan", "unroll", "vmap"] = "vmap"
    batch_stats: Literal["average", "carry"] = "average"
    mode: Literal["shard_map", "jit", "pmap"] = "shard_map"
    devices: int | None = None
    shard_optimizer: bool = False
    compact: bool = False


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


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that ``dataclasses.asdict`` turned into ``values``, perhaps by way of JSON.

    Raises:
        ValueError: for values that are not a recipe's, such as those of another version.
    """
    try:
        return _from_dict(Recipe, values)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"A recipe needs the fields of this version, received others ({error}): was it written "
            "by another version of this package?"
        ) from error


def _from_dict(kind: Any, value: Any) -> Any:
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        # JSON has no tuples.
        return tuple(value) if typing.get_origin(kind) is tuple else value
    hints = typing.get_type_hints(kind)
    if unknown := set(value) - set(hints):
        raise KeyError(f"unknown: {', '.join(unknown)}")
    return kind(**{name: _from_dict(hints[name], item) for name, item in value.items()})
