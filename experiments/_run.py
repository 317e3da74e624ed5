"""From a recipe to a run: data, model, step and loop."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments._models import make_model, make_transform
from experiments._recipes import Recipe
from wsbcn_flax import WeightStandardization
from wsbcn_flax.data import (
    Augment,
    ImageSplit,
    channel_statistics,
    eval_batches,
    load_split,
    train_batches,
)
from wsbcn_flax.training import (
    Batch,
    Checkpointer,
    Classification,
    EvalStep,
    JsonlWriter,
    LoopConfig,
    MetricWriter,
    MicroBatches,
    MultiWriter,
    Partition,
    TensorBoardWriter,
    TrainState,
    TrainStep,
    evaluate,
    fit,
    make_eval_step,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe with its data loaded and its steps compiled; ``fit`` runs it for any seed."""

    recipe: Recipe
    train_split: ImageSplit
    eval_split: ImageSplit
    task: Classification
    transform: WeightStandardization | None
    optimizer: optax.GradientTransformation
    partition: Partition
    train_step: TrainStep
    eval_step: EvalStep

    @classmethod
    def build(cls, recipe: Recipe) -> "Run":
        """Loads the data and makes the steps, which compile when they first run.

        Raises:
            ValueError: for a batch that devices and micro-batches do not divide.
        """
        load = functools.partial(load_split, recipe.data.name, data_dir=recipe.data.data_dir)
        train_split, eval_split = load(recipe.data.train_split), load(recipe.data.eval_split)
        partition = Partition(mode=recipe.batch.mode, devices=_devices(recipe.batch.devices))
        task = Classification(
            model=make_model(recipe, num_classes=train_split.num_classes),
            label_smoothing=recipe.label_smoothing,
        )
        transform = make_transform(recipe.weight)
        schedule = recipe.optim.make_schedule(
            steps_per_epoch=_steps_per_epoch(recipe, train_split), epochs=recipe.epochs
        )
        optimizer = recipe.optim.make(schedule)
        train_step = make_train_step(
            task.loss_fn,
            optimizer,
            transform=transform,
            micro_batches=_micro_batches(recipe, partition),
            axis_name=partition.axis_name,
            seed=recipe.seed,
        )
        eval_step = make_eval_step(task, transform=transform, axis_name=partition.axis_name)
        return cls(
            recipe,
            train_split,
            eval_split,
            task,
            transform,
            optimizer,
            partition,
            partition.compile(train_step),
            partition.compile(eval_step, donate_state=False),
        )

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return round(self.recipe.epochs * _steps_per_epoch(self.recipe, self.train_split))

    def initial_state(self, seed: int) -> TrainState:
        """The state before the first step, on all devices."""
        return self.partition.place_state(self._make_state(seed))

    def train_batches(self, seed: int, start_step: int) -> Iterator[Batch]:
        """Batches from ``start_step`` on, placed on the devices."""
        data, (mean, std) = self.recipe.data, self._statistics
        batches = train_batches(
            self.train_split,
            batch_size=self.recipe.batch.size,
            seed=seed,
            mean=mean,
            std=std,
            augment=Augment(crop_padding=data.crop_padding, horizontal_flip=data.flip),
            start_step=start_step,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
        )
        try:
            yield from map(self.partition.place_batch, batches)
        finally:
            batches.close()

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and error of a state over the whole evaluation split."""
        mean, std = self._statistics
        batches = eval_batches(
            self.eval_split,
            batch_size=256 * self.partition.mesh.size,
            mean=mean,
            std=std,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
        )
        return evaluate(self.eval_step, state, map(self.partition.place_batch, batches))

    def fit(
        self,
        config: LoopConfig,
        *,
        seed: int,
        checkpointer: Checkpointer | None = None,
        writer: MetricWriter | None = None,
        state: TrainState | None = None,
    ) -> tuple[TrainState, dict[str, float]]:
        """Trains from ``state``, or from the beginning."""
        return fit(
            self.train_step,
            self.initial_state(seed) if state is None else state,
            functools.partial(self.train_batches, seed),
            config=config,
            evaluate=self.evaluate,
            checkpointer=checkpointer,
            writer=writer,
        )

    def fit_in(
        self, folder: Path, config: LoopConfig, *, tensorboard: bool = False
    ) -> tuple[TrainState, dict[str, float]]:
        """Trains with checkpoints and metrics in a folder, resuming from what it holds."""
        with Checkpointer(folder / "checkpoints") as checkpointer:
            state = self.initial_state(self.recipe.seed)
            restored = checkpointer.restore_latest(state)
            if restored is not None:
                state = restored.state
            done = int(state.step)
            writers: list[MetricWriter] = [JsonlWriter(folder / "metrics.jsonl", resume_step=done)]
            if tensorboard:
                writers.append(TensorBoardWriter(folder / "tensorboard", resume_step=done))
            writer = MultiWriter(*writers)
            try:
                return self.fit(
                    config,
                    seed=self.recipe.seed,
                    checkpointer=checkpointer,
                    writer=writer,
                    state=state,
                )
            finally:
                writer.close()

    @functools.cached_property
    def _make_state(self) -> Callable[[int], TrainState]:
        """Compiled once for all seeds."""

        @jax.jit
        def make_state(seed):
            images = jnp.zeros((1, *self.train_split.image_shape))
            variables = dict(self.task.init(jax.random.key(seed), {"image": images}))
            if self.transform is not None:
                variables["params"] = self.transform.with_gains(variables["params"])
            return TrainState.create(variables, self.optimizer)

        return make_state

    @functools.cached_property
    def _statistics(self):
        return channel_statistics(self.train_split.images)


def _steps_per_epoch(recipe: Recipe, train_split: ImageSplit) -> int:
    steps = len(train_split) // recipe.batch.size
    if steps < 1:
        raise ValueError(
            f"The batch must not exceed the training set, received a batch of "
            f"{recipe.batch.size} for {len(train_split)} images."
        )
    return steps


def _devices(count: int | None) -> list[Any]:
    devices = jax.devices()
    if count is not None and not 1 <= count <= len(devices):
        raise ValueError(
            f"--batch.devices must be from 1 to the {len(devices)} devices here, received {count}."
        )
    return devices[:count]


def _micro_batches(recipe: Recipe, partition: Partition) -> MicroBatches:
    batch, devices = recipe.batch, partition.mesh.size
    # Under jit a micro-batch is spread over the devices; otherwise each device has its own.
    shares = 1 if batch.mode == "jit" else devices
    micro = batch.size // shares if batch.micro is None else batch.micro
    if micro < 1 or batch.size % (shares * micro) or batch.size % devices:
        raise ValueError(
            f"The batch must be a whole number of micro-batches on every device, received a batch "
            f"of {batch.size} for {devices} devices and micro-batches of {micro}."
        )
    return MicroBatches(
        count=batch.size // (shares * micro), loop=batch.loop, batch_stats=batch.batch_stats
    )
