"""Labelled images as the data of an experiment."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._recipe import DataConfig
from wsbcn_flax.data import (
    IMAGENET_STATISTICS,
    CentralCrop,
    DecodeImage,
    Normalize,
    RandomCrop,
    RandomFlip,
    RandomResizedCrop,
    channel_statistics,
    eval_batches,
    load_split,
    train_batches,
)


class Sizes(NamedTuple):
    """Sizes of a dataset as published: training images, classes, and (H, W, C) of an image."""

    train_size: int
    num_classes: int
    image_shape: tuple[int, int, int]


SIZES = {
    "mnist5k": Sizes(4_000, 10, (28, 28, 1)),
    "digits": Sizes(1_437, 10, (8, 8, 1)),
    "fashion": Sizes(60_000, 10, (28, 28, 1)),
    "mnist": Sizes(60_000, 10, (28, 28, 1)),
    "cifar10": Sizes(50_000, 10, (32, 32, 3)),
    "cifar100": Sizes(50_000, 100, (32, 32, 3)),
    "imagenet": Sizes(1_281_167, 1000, (224, 224, 3)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What building and using a classifier takes of its data.

    Attributes:
        train_size: Number of training images.
        class_names: Names of the classes, in the order of the logits.
        image_shape: Shape (H, W, C) of an image in a batch.
        mean: Mean of each channel, in units of the full scale.
        std: Standard deviation of each channel, in the same units.
    """

    train_size: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Facts":
        """Returns the facts whose fields JSON made lists of."""
        fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """The data of a classification: splits that are loaded when they are first used.

    Attributes:
        config: Dataset and augmentation.
        known: Facts that need not be found by loading the training split.
    """

    config: DataConfig
    known: Facts | None = None

    @classmethod
    def published(cls, config: DataConfig) -> "ImageData":
        """Returns data of the published sizes, whose batches need never be made."""
        sizes = SIZES[config.name]
        channels = sizes.image_shape[-1]
        names = tuple(map(str, range(sizes.num_classes)))
        shape = _crop_shape(config) if _is_encoded(config) else sizes.image_shape
        facts = Facts(
            train_size=sizes.train_size,
            class_names=names,
            image_shape=shape,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
        )
        return cls(config, facts)

    @functools.cached_property
    def train_split(self) -> Any:
        """The source to train on."""
        return load_split(self.config.name, self.config.train_split, data_dir=self.config.data_dir)

    @functools.cached_property
    def eval_split(self) -> Any:
        """The source to evaluate on."""
        return load_split(self.config.name, self.config.eval_split, data_dir=self.config.data_dir)

    @functools.cached_property
    def known_facts(self) -> Facts:
        """The facts, measured on the training split if need be."""
        if self.known is not None:
            return self.known
        split, encoded = self.train_split, _is_encoded(self.config)
        mean, std = IMAGENET_STATISTICS if encoded else channel_statistics(split.images)
        return Facts(
            train_size=len(split),
            class_names=split.class_names,
            image_shape=_crop_shape(self.config) if encoded else split.image_shape,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
        )

    def facts(self) -> dict[str, Any]:
        """Returns the facts as JSON values."""
        return dataclasses.asdict(self.known_facts)

    @property
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A normalized image and its class."""
        return {
            "image": jax.ShapeDtypeStruct(self.known_facts.image_shape, np.float32),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }

    def train_batches(
        self, *, batch_size: int, seed: int, start_step: int, **hosts: int
    ) -> Iterator[Mapping[str, Any]]:
        """Returns endless augmented batches."""
        config = self.config
        flip = (RandomFlip(),) if config.flip or _is_encoded(config) else ()
        if _is_encoded(config):
            example = (DecodeImage(), RandomResizedCrop(image_size=config.image_size), *flip)
            batch = (self._normalize,)
        else:
            example, batch = (), (RandomCrop(padding=config.crop_padding), *flip, self._normalize)
        return train_batches(
            self.train_split,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            example=example,
            batch=batch,
            **self._threads,
            **hosts,
        )

    @property
    def eval_size(self) -> int:
        """Number of images in the evaluation split."""
        return len(self.eval_split)

    def eval_batches(self, *, batch_size: int, **hosts: int) -> Iterable[Mapping[str, Any]]:
        """Returns the evaluation split once, in batches with a mask.

        Raises:
            ValueError: If its classes are not those of the training split.
        """
        classes = len(self.known_facts.class_names)
        if self.eval_split.num_classes != classes:
            raise ValueError(
                f"The model's classes must be the dataset's, received {classes} and "
                f"{self.eval_split.num_classes}."
            )
        return eval_batches(
            self.eval_split,
            batch_size=batch_size,
            example=self.eval_transforms,
            batch=(self._normalize,),
            **self._threads,
            **hosts,
        )

    @property
    def eval_transforms(self) -> tuple[Any, ...]:
        """The transforms from an encoded image to the crop that is evaluated."""
        if not _is_encoded(self.config):
            return ()
        crop = CentralCrop(image_size=self.config.image_size, resize=self.config.resize)
        return DecodeImage(), crop

    @property
    def _normalize(self) -> Normalize:
        return Normalize(mean=self.known_facts.mean, std=self.known_facts.std)

    @property
    def _threads(self) -> dict[str, int]:
        return {"num_threads": self.config.threads} if _is_encoded(self.config) else {}


def _is_encoded(config: DataConfig) -> bool:
    return config.name == "imagenet"


def _crop_shape(config: DataConfig) -> tuple[int, int, int]:
    return config.image_size, config.image_size, 3
