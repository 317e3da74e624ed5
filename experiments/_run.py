"""From a recipe to a run: data, model, step and loop."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

from experiments._config import BatchConfig, Recipe
from experiments._data import Dataset, load_dataset
from experiments._data_specs import DATA_SPECS
from experiments._models import make_loss_scale, make_model, make_transform
from wsbcn_flax import WeightStandardization
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
    StopRule,
    TensorBoardWriter,
    TrainState,
    TrainStep,
    evaluate,
    fit,
    is_first_process,
    make_eval_step,
    make_train_step,
    stop_on_sigterm,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe with its data loaded and its steps compiled; ``fit`` runs it for any seed."""

    recipe: Recipe
    dataset: Dataset[Any]
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
        dataset = load_dataset(recipe.data)
        partition = make_partition(recipe.batch, _devices(recipe.batch.devices))
        steps = make_steps(
            recipe,
            partition,
            num_classes=dataset.train_split.num_classes,
            steps_per_epoch=dataset.steps_per_epoch(recipe.batch.size),
        )
        return cls(
            recipe,
            dataset,
            steps.task,
            steps.transform,
            steps.optimizer,
            partition,
            partition.compile(steps.train),
            partition.compile(steps.evaluate, donate_state=False),
        )

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return round(self.recipe.epochs * self.dataset.steps_per_epoch(self.recipe.batch.size))

    def initial_state(self, seed: int) -> TrainState:
        """The state before the first step, on all devices."""
        return self.partition.place_state(self._make_state(seed))

    def train_batches(self, seed: int, start_step: int) -> Iterator[Batch]:
        """Batches from ``start_step`` on, placed on the devices."""
        batches = self.dataset.train_batches(
            batch_size=self.recipe.batch.size, seed=seed, start_step=start_step
        )
        with contextlib.closing(batches):
            yield from map(self.partition.place_batch, batches)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and errors of a state over the whole evaluation split."""
        devices, images = self.partition.mesh.size, len(self.dataset.eval_split)
        batch_size = devices * min(256, math.ceil(images / devices))
        batches = self.dataset.eval_batches(batch_size=batch_size)
        batches = map(self.partition.place_batch, batches)
        return evaluate(self.eval_step, state, batches, transform=self.transform)

    def fit(
        self,
        config: LoopConfig,
        *,
        seed: int,
        checkpointer: Checkpointer | None = None,
        writer: MetricWriter | None = None,
        state: TrainState | None = None,
        should_stop: StopRule = lambda step: False,
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
            should_stop=should_stop,
        )

    def fit_in(
        self, folder: Path, config: LoopConfig, *, tensorboard: bool = False
    ) -> tuple[TrainState, dict[str, float]]:
        """Trains with checkpoints and metrics in a folder, resuming from what it holds.

        Raises:
            PreemptedError: after SIGTERM, with a checkpoint of the step it stopped at.
        """
        checkpoints = Checkpointer(folder / "checkpoints")
        with stop_on_sigterm() as should_stop, checkpoints as checkpointer:
            state = self.initial_state(self.recipe.seed)
            restored = checkpointer.restore_latest(state)
            if restored is not None:
                state = restored.state
            done = int(state.step)
            writers: list[MetricWriter] = []
            if is_first_process():
                writers.append(JsonlWriter(folder / "metrics.jsonl", resume_step=done))
            if is_first_process() and tensorboard:
                writers.append(TensorBoardWriter(folder / "tensorboard", resume_step=done))
            writer = MultiWriter(*writers)
            try:
                return self.fit(
                    config,
                    seed=self.recipe.seed,
                    checkpointer=checkpointer,
                    writer=writer,
                    state=state,
                    should_stop=should_stop,
                )
            finally:
                writer.close()

    @functools.cached_property
    def _make_state(self) -> Callable[[int], TrainState]:
        """Compiled once for all seeds."""
        return jax.jit(
            functools.partial(
                make_state,
                self.task,
                self.optimizer,
                transform=self.transform,
                image_shape=self.dataset.image_shape,
                loss_scale=make_loss_scale(self.recipe.model),
            )
        )


class Steps(NamedTuple):
    """What a recipe trains with, as pure functions; no data are needed to make them."""

    task: Classification
    transform: WeightStandardization | None
    optimizer: optax.GradientTransformation
    train: TrainStep
    evaluate: EvalStep


def make_steps(
    recipe: Recipe, partition: Partition, *, num_classes: int, steps_per_epoch: int
) -> Steps:
    """The steps of a recipe, to compile with ``partition``."""
    model = make_model(recipe, num_classes=num_classes, axis_name=partition.axis_name)
    task = Classification(model=model, label_smoothing=recipe.label_smoothing)
    image_shape = DATA_SPECS[recipe.data.name].image_shape
    transform = make_transform(recipe.weight, model=model, image_shape=image_shape)
    schedule = recipe.optim.make_schedule(steps_per_epoch=steps_per_epoch, epochs=recipe.epochs)
    optimizer = recipe.optim.make(schedule)
    train = make_train_step(
        task.loss_fn,
        optimizer,
        transform=transform,
        # Only where kernels are computed is there anything to gain by writing them down.
        kernel_dtype=None if transform is None else jnp.dtype(recipe.model.dtype),
        micro_batches=_micro_batches(recipe, partition),
        axis_name=partition.axis_name,
        seed=recipe.seed,
    )
    evaluate = make_eval_step(task, axis_name=partition.axis_name)
    return Steps(task, transform, optimizer, train, evaluate)


def make_state(
    task: Classification,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    transform: WeightStandardization | None,
    image_shape: tuple[int, int, int],
    loss_scale: DynamicScale | None = None,
) -> TrainState:
    """The state before the first step."""
    images = jnp.zeros((1, *image_shape))
    variables = dict(task.init(jax.random.key(seed), {"image": images}))
    if transform is not None:
        variables["params"] = transform.with_gains(variables["params"])
    return TrainState.create(variables, optimizer, loss_scale=loss_scale)


def make_partition(batch: BatchConfig, devices: Sequence[Any]) -> Partition:
    """How a recipe uses devices."""
    return Partition(
        mode=batch.mode,
        devices=devices,
        shard_optimizer=batch.shard_optimizer,
        compact=batch.compact,
    )


def _devices(count: int | None) -> list[Any]:
    devices = jax.devices()
    if jax.process_count() > 1 and count not in (None, len(devices)):
        raise ValueError(
            f"--batch.devices is for one process alone: the {jax.process_count()} processes of a "
            f"run use all their {len(devices)} devices, received {count}. Leave it out."
        )
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
