"""From a data configuration to batches: small sets from memory, ImageNet decoded on the way."""

import abc
import dataclasses
import functools
from typing import Any, Generic, TypeVar

import jax

from experiments._config import DataConfig
from wsbcn_flax.data import (
    IMAGENET_STATISTICS,
    Augment,
    ChannelStatistics,
    EncodedSplit,
    ImageSplit,
    channel_statistics,
    encoded_eval_batches,
    encoded_train_batches,
    eval_batches,
    load_encoded_split,
    load_split,
    train_batches,
)

SplitT = TypeVar("SplitT", ImageSplit, EncodedSplit)


@dataclasses.dataclass(frozen=True)
class Dataset(abc.ABC, Generic[SplitT]):
    """A training and an evaluation split, and this host's share of the batches made from them.

    Attributes:
        config: what was loaded.
        train_split: to train on.
        eval_split: to evaluate on.
        statistics: what images are normalized with.
    """

    config: DataConfig
    train_split: SplitT
    eval_split: SplitT
    statistics: ChannelStatistics

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Of the images in a batch: [H, W, C]."""

    @abc.abstractmethod
    def train_batches(self, *, batch_size: int, seed: int, start_step: int) -> Any:
        """Endless batches from ``start_step`` on; an iterator to close."""

    @abc.abstractmethod
    def eval_batches(self, *, batch_size: int) -> Any:
        """The evaluation split once through."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training split.

        Raises:
            ValueError: if there is none.
        """
        steps = len(self.train_split) // batch_size
        if steps < 1:
            raise ValueError(
                f"The batch must not exceed the training set, received a batch of {batch_size} "
                f"for {len(self.train_split)} images."
            )
        return steps

    def _shared_options(self) -> dict[str, Any]:
        mean, std = self.statistics
        hosts = {"host_index": jax.process_index(), "host_count": jax.process_count()}
        return {"mean": mean, "std": std, **hosts}


class _InMemory(Dataset[ImageSplit]):
    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train_split.image_shape

    def train_batches(self, *, batch_size: int, seed: int, start_step: int) -> Any:
        augment = Augment(crop_padding=self.config.crop_padding, horizontal_flip=self.config.flip)
        return train_batches(
            self.train_split,
            batch_size=batch_size,
            seed=seed,
            augment=augment,
            start_step=start_step,
            **self._shared_options(),
        )

    def eval_batches(self, *, batch_size: int) -> Any:
        return eval_batches(self.eval_split, batch_size=batch_size, **self._shared_options())


class _Encoded(Dataset[EncodedSplit]):
    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.config.image_size, self.config.image_size, 3)

    def train_batches(self, *, batch_size: int, seed: int, start_step: int) -> Any:
        return encoded_train_batches(
            self.train_split,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            **self._shared_options(),
        )

    def eval_batches(self, *, batch_size: int) -> Any:
        return encoded_eval_batches(
            self.eval_split,
            batch_size=batch_size,
            resize=self.config.resize,
            **self._shared_options(),
        )

    def _shared_options(self) -> dict[str, Any]:
        own = {"image_size": self.config.image_size, "num_threads": self.config.threads}
        return {**super()._shared_options(), **own}


def load_dataset(config: DataConfig) -> Dataset[Any]:
    """Loads the splits that a configuration names.

    Raises:
        DatasetNotFoundError: if the data are not on this machine; says how to get them.
        ValueError: for an unknown name or split.
    """
    names = (config.train_split, config.eval_split)
    if config.name == "imagenet":
        load = functools.partial(load_encoded_split, config.name, data_dir=config.data_dir)
        train_split, eval_split = map(load, names)
        return _Encoded(config, train_split, eval_split, IMAGENET_STATISTICS)
    load = functools.partial(load_split, config.name, data_dir=config.data_dir)
    train_split, eval_split = map(load, names)
    return _InMemory(config, train_split, eval_split, channel_statistics(train_split.images))
