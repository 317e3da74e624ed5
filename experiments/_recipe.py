"""Recipes, frozen dataclasses that hold every number that a run depends on."""

import abc
import dataclasses
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale

from wsbcn_flax.tasks import Ema, Task
from wsbcn_flax.training import BatchConfig, Data, Experiment, OptimizerConfig

Norm = Literal["bn", "gn", "ln", "in", "bcn"]
Baseline = Literal["none", "naive_bcn", "bn_barrier"]
Weight = Literal["none", "ws", "wn", "cwn"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A dataset, its splits and its augmentation.

    Attributes:
        name: Name of the dataset, one of ``wsbcn_flax.data.dataset_names``.
        train_split: Training split, in the syntax of tensorflow-datasets.
        eval_split: Evaluation split, in the same syntax.
        crop_padding: Number of pixels padded before a random crop to the image's size. ImageNet's
            crops are random-resized instead.
        flip: Whether to mirror half of the images; always done for ImageNet.
        image_size: Side of ImageNet's crops, in pixels; other images keep their size.
        resize: Shorter side of ImageNet's evaluation images before the crop, in pixels.
        threads: Number of threads that decode ImageNet's images.
        data_dir: Folder of datasets; a folder in the user's cache if None.
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

    def __post_init__(self):
        if self.threads < 0:
            raise ValueError(f"data.threads must be at least 0, received {self.threads}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network.

    Attributes:
        name: Name of the network as in a recipe's name: resnet20, wrn28_10, resnet50, ...
        width: Channels of the stem of a CIFAR residual network; the network's own if None.
        stem_strides: Strides of the stem of a CIFAR residual network; the network's own if None.
        dtype: Computation dtype; parameters and statistics are float32. "float16" scales the loss.
        remat: Whether residual blocks are computed again in the backward pass, so that only their
            inputs stay in memory.
    """

    name: str = "resnet8"
    width: int | None = None
    stem_strides: int | None = None
    dtype: Dtype = "float32"
    remat: bool = False

    def __post_init__(self):
        for name in ("width", "stem_strides"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} must be at least 1, received {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A normalization.

    Attributes:
        kind: Batch, group, layer, instance or batch-channel normalization, or a baseline of
            `experiments._baselines`.
        groups: Number of groups of gn and of bcn's channel part, at least 1.
        rate: Step size of the running statistics of bn and bcn; one minus Flax's momentum.
        sync: Whether bn and bcn average batch statistics over all devices; mode "jit" always does.
        statistics: Statistics of bcn's batch part, "estimate" or "batch".
        order: Order of bcn's update; with "normalize_first" a step is the same for any split.
        affine: Scale and bias of bcn's channel part, per "group" or per "channel".
    """

    kind: Norm | Baseline = "bcn"
    groups: int = 4
    rate: float = 0.1
    sync: bool = False
    statistics: Literal["estimate", "batch"] = "estimate"
    order: Literal["update_first", "normalize_first"] = "normalize_first"
    affine: Literal["group", "channel"] = "group"

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"norm.groups must be at least 1, received {self.groups}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """A transform of convolution kernels before they are used.

    Attributes:
        kind: Name of the transform: none, ws (Weight Standardization), wn (weight normalization)
            or cwn (centered weight normalization).
        preset: Convention of "ws": bcn, official, official_tf, bit, timm, aws or nfnet.
    """

    kind: Weight = "none"
    preset: str = "bcn"

    @property
    def convention(self) -> str:
        """Name of the convention for ``wsbcn_flax.standardize``."""
        return self.preset if self.kind == "ws" else self.kind


_OPTIM = OptimizerConfig(learning_rate=0.1, warmup_epochs=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(abc.ABC):
    """A whole run; each subclass is for one task.

    Attributes:
        data: Dataset, of the task's own type, with a name, an eval_split and a data_dir.
        model: Network, of the task's own type, with a name, a dtype and an option remat.
        norm: Normalization of the network.
        weight: Transform of the network's kernels.
        batch: Batch size, and the split of a batch over devices and micro-batches.
        optim: Optimizer and its schedule.
        epochs: Length of training in epochs.
        seed: Seed of initialization, order and augmentation.
        ema: Decay of the parameters' moving average, such as 0.999, which is evaluated instead of
            them; None evaluates the parameters.
    """

    # Whether a serialized program takes any number of inputs rather than one.
    any_batch: ClassVar[bool] = True
    # Whether evaluation gives ``eval_error``, a fraction of the samples.
    has_error: ClassVar[bool] = False

    data: Any
    model: Any
    norm: NormConfig = NormConfig()
    weight: WeightConfig = WeightConfig()
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optim: OptimizerConfig = _OPTIM
    epochs: float = 8.0
    seed: int = 0
    ema: float | None = None

    def __post_init__(self):
        if not self.epochs > 0:
            raise ValueError(f"epochs must be positive, received {self.epochs}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, received {self.seed}.")

    @abc.abstractmethod
    def load_data(self) -> Data:
        """Loads the dataset.

        Raises:
            DatasetNotFoundError: If it is not on this machine; says how to obtain it.
        """

    @abc.abstractmethod
    def data_of_run(self, facts: Mapping[str, Any]) -> Data:
        """Returns the data of a run that recorded these facts; loads only what is used."""

    @abc.abstractmethod
    def experiment(self, data: Any = None) -> Experiment:
        """Returns the experiment on ``data``.

        Without data, it has the dataset's published sizes, which suffice to compile it.
        """

    def trained_variables(self) -> Mapping[str, Any]:
        """Returns variables that training starts from; all others are initialized at random."""
        return {}

    def assemble(
        self,
        task: Task,
        data: Data,
        *,
        train_size: int,
        transform: Callable[[Any], Any] | None,
        **options: Any,
    ) -> Experiment:
        """Returns the experiment of a task, from the fields that all recipes have.

        Args:
            task: Task; it is wrapped in `Ema` here if the recipe has ``ema``.
            data: Dataset.
            train_size: Number of training samples, which gives an epoch its length.
            transform: Transform of parameters; None for the identity.
            **options: Other fields of ``Experiment``.
        """
        steps_per_epoch = max(1, train_size // self.batch.size)
        schedule = self.optim.make_schedule(steps_per_epoch=steps_per_epoch, epochs=self.epochs)
        dtype = jnp.dtype(self.model.dtype)
        return Experiment(
            task=task if self.ema is None else Ema(task=task, decay=self.ema),
            data=data,
            optimizer=self.optim.make(schedule),
            steps=round(self.epochs * steps_per_epoch),
            batch=self.batch,
            transform=transform,
            # Rounding kernels once a step pays off only if a transform computes them.
            kernel_dtype=None if transform is None else dtype,
            loss_scale=DynamicScale() if dtype == jnp.float16 else None,
            seed=self.seed,
            **options,
        )

    @abc.abstractmethod
    def predict_fn(self, data: Any, variables: Mapping[str, Any]) -> Callable[[Any], Any]:
        """Returns the function from raw inputs [B, ...] to outputs; uses kernels as they are."""

    @abc.abstractmethod
    def raw_inputs(self, data: Any, batch: Any) -> Any:
        """Returns a pytree of the shapes and dtypes of ``batch`` raw inputs."""

    @abc.abstractmethod
    def read_input(self, path: Path, data: Any) -> Any:
        """Reads a file as one raw input, a pytree of arrays."""

    @abc.abstractmethod
    def describe_output(self, output: Any, data: Any, *, top: int) -> list[dict[str, str]]:
        """Returns the best predictions for one input, as rows of a table."""


def from_json(kind: Any, value: Any) -> Any:
    """Returns the dataclass ``kind`` that ``dataclasses.asdict`` and JSON turned into ``value``.

    Raises:
        KeyError: For a field that ``kind`` does not have.
        TypeError: If a field is missing.
    """
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        return _tuples(value) if typing.get_origin(kind) is tuple else value
    hints = typing.get_type_hints(kind)
    if unknown := set(value) - set(hints):
        raise KeyError(f"unknown: {', '.join(unknown)}")
    return kind(**{name: from_json(hints[name], item) for name, item in value.items()})


def _tuples(value: Any) -> Any:
    """Turns lists, which JSON has instead of tuples, back into tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
