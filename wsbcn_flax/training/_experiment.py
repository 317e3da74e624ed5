"""The experiment: one object to train, evaluate, compile and measure a task."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

from wsbcn_flax._folder_lock import lock_folder
from wsbcn_flax.tasks import Batch, Task
from wsbcn_flax.training._batch_config import BatchConfig
from wsbcn_flax.training._evaluation import Average, EvalStep, Evaluator, evaluate, make_eval_step
from wsbcn_flax.training._loop import LoopConfig, fit
from wsbcn_flax.training._partition import Partition
from wsbcn_flax.training._run_folder import claim_folder
from wsbcn_flax.training._state import TrainState, init_state
from wsbcn_flax.training._step import TrainStep, make_train_step
from wsbcn_flax.training.checkpoints import Checkpointer
from wsbcn_flax.training.preemption import stop_on_signal
from wsbcn_flax.training.processes import is_first_process, on_first_process
from wsbcn_flax.training.progress import Progress
from wsbcn_flax.training.writers import (
    JsonlWriter,
    MetricWriter,
    MultiWriter,
    TensorBoardWriter,
    write_json,
)


class Data(Protocol):
    """The interface of the data that an experiment trains and evaluates on."""

    @property
    def element_spec(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array of one training example, known without reading data."""
        ...

    def train_batches(
        self, *, batch_size: int, seed: int, start_step: int, host_index: int, host_count: int
    ) -> Iterator[Mapping[str, Any]]:
        """Returns this host's share of the endless batches that start with ``start_step``.

        If the iterator has ``close()``, that is called at the end.
        """
        ...

    @property
    def eval_size(self) -> int:
        """Number of samples in the evaluation split."""
        ...

    def eval_batches(
        self, *, batch_size: int, host_index: int, host_count: int
    ) -> Iterable[Mapping[str, Any]]:
        """Returns this host's share of one pass over the evaluation split."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """Returns facts about the data that prediction needs, as JSON values; a run keeps them."""
        ...


class Program(NamedTuple):
    """An experiment's functions for its devices; each compiles when it first runs.

    Attributes:
        partition: Devices and how they are used.
        init: ``seed -> state``, the state before the first step, on the devices.
        train: ``(state, batch) -> (state, metrics)``.
        evaluate: ``(state, batch) -> outputs``.
    """

    partition: Partition
    init: Callable[[int], TrainState]
    train: TrainStep
    evaluate: EvalStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A task with everything needed to train and evaluate it.

    Attributes:
        task: Task to train.
        data: Batches to train and evaluate on.
        optimizer: Any optax transformation.
        steps: Total number of training steps.
        batch: Global batch and its split.
        transform: Transform params -> params of the training step; None for the identity.
        kernel_dtype: Dtype that kernels are rounded to once a step; see ``make_train_step``.
        loss_scale: Flax's dynamic scale for float16; None for no scaling.
        evaluators: Functions that make the evaluators.
        seed: Seed of initialization, sample order, augmentation and dropout.
        trained: Variables that replace the task's initial ones of the same paths, such as those of
            a pretrained backbone.
    """

    task: Task
    data: Data
    optimizer: optax.GradientTransformation
    steps: int
    batch: BatchConfig
    transform: Callable[[Any], Any] | None = None
    kernel_dtype: jax.typing.DTypeLike | None = None
    loss_scale: DynamicScale | None = None
    evaluators: Sequence[Callable[[], Evaluator]] = (Average,)
    seed: int = 0
    trained: Mapping[str, Any] | None = None

    def init(self, seed: int, trained: Mapping[str, Any] | None = None) -> TrainState:
        """Makes the state before the first step; ``jax.eval_shape`` of it gives only its shapes.

        Args:
            seed: Seed of the variables.
            trained: The experiment's ``trained``, or None. It is an argument so that a compiled
                function does not contain its arrays.

        Raises:
            ValueError: For trained variables that the task does not have, or of another shape.
        """
        spec = self.data.element_spec
        batch = {name: jnp.zeros((1, *x.shape), x.dtype) for name, x in spec.items()}
        return init_state(
            self.task,
            self.optimizer,
            jax.random.key(seed),
            batch,
            transform=self.transform,
            loss_scale=self.loss_scale,
            trained=trained,
        )

    def compile(self, devices: Sequence[Any] | None = None) -> Program:
        """Makes the functions for ``devices``, by default the devices of ``batch``.

        Raises:
            ValueError: If devices and micro-batches do not divide the batch.
        """
        partition = self.batch.partition(devices)
        train = make_train_step(
            self.task,
            self.optimizer,
            transform=self.transform,
            kernel_dtype=self.kernel_dtype,
            micro_batches=self.batch.micro_batches(partition.mesh.size),
            axis_name=partition.axis_name,
            reduce_dtype=self.batch.reduce_dtype,
            seed=self.seed,
        )
        init = jax.jit(self.init)
        return Program(
            partition,
            lambda seed: partition.place_state(init(seed, self.trained)),
            partition.compile(train),
            partition.compile(
                make_eval_step(self.task, axis_name=partition.axis_name), donate_state=False
            ),
        )

    def lower(self, devices: Sequence[Any]) -> jax.stages.Lowered:
        """Lowers the training step for ``devices``, which may be absent, without reading data."""
        spec = {
            name: jax.ShapeDtypeStruct((self.batch.size, *x.shape), x.dtype)
            for name, x in self.data.element_spec.items()
        }
        step: Any = self.compile(devices).train
        return step.lower(jax.eval_shape(lambda: self.init(self.seed)), spec)

    def batches(
        self, partition: Partition, seed: int, start_step: int
    ) -> Iterator[Mapping[str, jax.Array]]:
        """Yields training batches starting with ``start_step``, placed on the devices."""
        batches = self.data.train_batches(
            batch_size=self.batch.size, seed=seed, start_step=start_step, **_host()
        )
        try:
            yield from map(partition.place_batch, batches)
        finally:
            getattr(batches, "close", lambda: None)()  # Ends the threads of grain's iterators.

    def for_evaluation(self, state: TrainState) -> TrainState:
        """Returns the state to evaluate and export, such as an average over steps."""
        return getattr(self.task, "for_evaluation", lambda state: state)(state)

    def evaluate(
        self, program: Program, state: TrainState, *, show_progress: bool = False
    ) -> dict[str, float]:
        """Returns the metrics of a state over the whole evaluation split."""
        size = self.batch.size if self.batch.evaluation is None else self.batch.evaluation
        batches = self.data.eval_batches(batch_size=size, **_host())
        total = -(-self.data.eval_size // size)
        with Progress("evaluate", total=total, enabled=show_progress) as progress:
            progress.note("compiling the step")  # Shown briefly if it is already compiled.

            def placed() -> Iterator[Batch]:
                for number, batch in enumerate(batches, start=1):
                    yield program.partition.place_batch(batch)
                    progress.update(number)

            return evaluate(
                program.evaluate,
                self.for_evaluation(state),
                placed(),
                transform=self.transform,
                evaluators=self.evaluators,
            )

    def run(
        self,
        folder: Path | None = None,
        *,
        config: LoopConfig,
        program: Program | None = None,
        seed: int | None = None,
        tensorboard: bool = False,
        recipe: Mapping[str, Any] | None = None,
    ) -> tuple[TrainState, dict[str, float]]:
        """Trains with checkpoints and metrics in a folder, resuming from its latest checkpoint.

        The folder is locked before anything in it is read or written.

        Args:
            folder: Folder of the run; None saves nothing.
            config: Number of steps, and intervals of logging, evaluation and checkpoints.
            program: Result of ``compile``, to compile once for many seeds.
            seed: Seed that replaces the experiment's own; a given program keeps its dropout.
            tensorboard: Whether to write TensorBoard's files too.
            recipe: JSON values that distinguish this run from others, kept as ``recipe.json``.

        Returns:
            The state after the last step, and the metrics of its evaluation.

        Raises:
            FolderInUseError: If another process trains in the folder.
            ValueError: If the folder holds a run of another recipe.
            PreemptedError: After SIGTERM or Ctrl-C, with a checkpoint of the step it stopped at.
        """
        seed = self.seed if seed is None else seed
        program = program or dataclasses.replace(self, seed=seed).compile()
        state = program.init(seed)  # Before the folder is claimed, since it may raise.
        with contextlib.ExitStack() as stack:
            options: dict[str, Any] = {}
            if folder is not None:
                on_first_process(lambda: stack.enter_context(lock_folder(folder)))
                if recipe is not None:
                    on_first_process(lambda: claim_folder(folder, recipe))
                options["should_stop"] = stack.enter_context(stop_on_signal())
                checkpointer = stack.enter_context(Checkpointer(folder / "checkpoints"))
                restored = checkpointer.restore_latest(state)
                state = state if restored is None else restored.state
                writer = self._writer(folder, int(state.step), tensorboard=tensorboard)
                stack.callback(writer.close)
                options.update(checkpointer=checkpointer, writer=writer)
            return fit(
                program.train,
                state,
                functools.partial(self.batches, program.partition, seed),
                config=config,
                evaluate=functools.partial(
                    self.evaluate,
                    program,
                    # In a log, lines of evaluations would hide those of the training.
                    show_progress=config.show_progress and sys.stderr.isatty(),
                ),
                **options,
            )

    def _writer(self, folder: Path, done: int, *, tensorboard: bool) -> MetricWriter:
        """Writes the data's facts and makes the writers of metrics, on the first process only."""
        writers: list[MetricWriter] = []
        if is_first_process():
            write_json(folder / "data.json", dict(self.data.facts()))
            writers.append(JsonlWriter(folder / "metrics.jsonl", resume_step=done))
            if tensorboard:
                writers.append(TensorBoardWriter(folder / "tensorboard", resume_step=done))
        return MultiWriter(*writers)


def _host() -> dict[str, int]:
    return {"host_index": jax.process_index(), "host_count": jax.process_count()}
