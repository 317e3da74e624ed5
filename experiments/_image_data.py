"""Labelled images as the data of an experiment."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from experiments._recipe import DataConfig
from wsbcn_flax.data import (
    IMAGENET_STATISTICS,
    CentralCrop,
    ChannelStatistics,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Facts of a dataset that are needed to build and use a classifier.

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

    def with_statistics(self, statistics: ChannelStatistics) -> "ImageFacts":
        """Returns the facts with other channel statistics."""
        mean, std = (tuple(values.tolist()) for values in statistics)
        return dataclasses.replace(self, mean=mean, std=std)


def _published(train_size: int, num_classes: int, image_shape: tuple[int, int, int]) -> ImageFacts:
    """Returns facts that need no image; names and statistics are placeholders."""
    channels = image_shape[-1]
    return ImageFacts(
        train_size=train_size,
        class_names=tuple(map(str, range(num_classes))),
        image_shape=image_shape,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )


PUBLISHED_FACTS = {
    "mnist5k": _published(4_000, 10, (28, 28, 1)),
    "digits": _published(1_437, 10, (8, 8, 1)),
    "fashion": _published(60_000, 10, (28, 28, 1)),
    "mnist": _published(60_000, 10, (28, 28, 1)),
    "cifar10": _published(50_000, 10, (32, 32, 3)),
    "cifar100": _published(50_000, 100, (32, 32, 3)),
    "imagenet": _published(1_281_167, 1000, (224, 224, 3)).with_statistics(IMAGENET_STATISTICS),
}


def published_facts(config: DataConfig) -> ImageFacts:
    """Returns the facts that are known without data; they suffice to compile an experiment."""
    facts, size = PUBLISHED_FACTS[config.name], config.image_size
    return dataclasses.replace(facts, image_shape=(size, size, 3)) if _is_encoded(config) else facts


def _is_encoded(config: DataConfig) -> bool:
    return config.name == "imagenet"


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Labelled images to train and evaluate on, as splits that are loaded when first used.

    Attributes:
        config: Dataset and augmentation.
        given: Facts of the dataset; measured on the training split if None.
    """

    config: DataConfig
    given: ImageFacts | None = None

    @functools.cached_property
    def train_split(self) -> Any:
        """The source to train on."""
        return load_split(self.config.name, self.config.train_split, data_dir=self.config.data_dir)

    @functools.cached_property
    def eval_split(self) -> Any:
        """The source to evaluate on."""
        return load_split(self.config.name, self.config.eval_split, data_dir=self.config.data_dir)

    @functools.cached_property
    def image_facts(self) -> ImageFacts:
        """The given facts, or else measured ones."""
        if self.given is not None:
            return self.given
        split = self.train_split
        facts = dataclasses.replace(
            published_facts(self.config), train_size=len(split), class_names=split.class_names
        )
        if _is_encoded(self.config):
            return facts
        facts = dataclasses.replace(facts, image_shape=split.image_shape)
        return facts.with_statistics(channel_statistics(split.images))

    def facts(self) -> dict[str, Any]:
        """Returns the facts as JSON values."""
        return dataclasses.asdict(self.image_facts)

    @property
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of a normalized image and its class."""
        return {
            "image": jax.ShapeDtypeStruct(self.image_facts.image_shape, np.float32),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }

    def train_batches(self, **options: int) -> Iterator[Mapping[str, Any]]:
        """Returns endless augmented batches; has the options of `wsbcn_flax.data.train_batches`."""
        config = self.config
        flip = (RandomFlip(),) if config.flip or _is_encoded(self.config) else ()
        if _is_encoded(self.config):
            example = (DecodeImage(), RandomResizedCrop(image_size=config.image_size), *flip)
            batch = (self._normalize,)
        else:
            example, batch = (), (RandomCrop(padding=config.crop_padding), *flip, self._normalize)
        options = self._threads | options
        return train_batches(self.train_split, example=example, batch=batch, **options)

    @property
    def eval_size(self) -> int:
        """Number of images in the evaluation split."""
        return len(self.eval_split)

    def eval_batches(self, **options: int) -> Iterable[Mapping[str, Any]]:
        """Returns one pass over the evaluation split, with the options of `data.eval_batches`.

        Raises:
            ValueError: If its classes are not those of the training split.
        """
        classes = len(self.image_facts.class_names)
        if self.eval_split.num_classes != classes:
            raise ValueError(
                f"The evaluation split must have the model's {classes} classes, received "
                f"{self.eval_split.num_classes}."
            )
        example, batch = self.eval_transforms, (self._normalize,)
        options = self._threads | options
        return eval_batches(self.eval_split, example=example, batch=batch, **options)

    @property
    def eval_transforms(self) -> tuple[Any, ...]:
        """The transforms from an encoded image to the crop that is evaluated."""
        if not _is_encoded(self.config):
            return ()
        crop = CentralCrop(image_size=self.config.image_size, resize=self.config.resize)
        return DecodeImage(), crop

    @property
    def _normalize(self) -> Normalize:
        return Normalize(mean=self.image_facts.mean, std=self.image_facts.std)

    @property
    def _threads(self) -> dict[str, int]:
        return {"num_threads": self.config.threads} if _is_encoded(self.config) else {}
