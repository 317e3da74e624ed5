"""The training loop of every task."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax

from wsbcn_flax.tasks import Batch
from wsbcn_flax.training._evaluation import (
    NonFiniteLossError,
    as_floats,
    check_evaluation,
    non_finite,
)
from wsbcn_flax.training._state import TrainState
from wsbcn_flax.training._step import TrainStep
from wsbcn_flax.training.checkpoints import Checkpointer
from wsbcn_flax.training.preemption import PreemptedError, StopRule
from wsbcn_flax.training.progress import Progress
from wsbcn_flax.training.writers import MetricWriter, MultiWriter


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The length of training, and the intervals of logging, evaluation and checkpoints, in steps.

    Attributes:
        steps: Step at which training ends.
        log_every: Interval of writing training metrics, which are also written at the end.
        eval_every: Interval of evaluations besides the one at the end; None for the end only.
        checkpoint_every: Interval of checkpoints besides the one at the end; None for the end only.
        show_progress: Whether to display progress.

    Raises:
        ValueError: For a number below one.
    """

    steps: int
    log_every: int = 50
    eval_every: int | None = None
    checkpoint_every: int | None = None
    show_progress: bool = True

    def __post_init__(self):
        for name in ("steps", "log_every", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 step, received {value}.")


def fit(
    step: TrainStep,
    state: TrainState,
    make_batches: Callable[[int], Iterator[Batch]],
    *,
    config: LoopConfig,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    checkpointer: Checkpointer | None = None,
    writer: MetricWriter | None = None,
    should_stop: StopRule = lambda step: False,
) -> tuple[TrainState, dict[str, float]]:
    """Trains from the state's step to ``config.steps``.

    A state restored from a checkpoint continues exactly where it stopped, since batches depend on
    the step alone. Metrics are read one step late, so that the device does not wait for the host.
    A state is only saved, evaluated or returned after every loss up to it was found finite.

    Args:
        step: Compiled training step; it may donate the state it receives.
        state: State to start from, already on its devices.
        make_batches: Maps a number of finished steps to an iterator of the batches that follow.
        config: Number of steps, and intervals.
        evaluate: Function from a state to metrics, which are written with the prefix ``eval_``.
        checkpointer: Checkpointer inside its ``with`` block; None saves nothing.
        writer: Writer of the metrics; None writes nothing.
        should_stop: Function called with the number of every finished step. When it returns true,
            the state is saved and training ends early. See ``stop_on_signal``.

    Returns:
        The state after the last step, and the metrics of its evaluation (empty without
        ``evaluate``).

    Raises:
        ValueError: For a state beyond ``config.steps``, batches that end before it, or metrics
            that are not scalars.
        NonFiniteLossError: If a training metric, such as a loss or gradient norm, is not finite. If
            an evaluation metric is not, the step is first saved if that was due. Earlier
            checkpoints stay as they are.
        PreemptedError: If ``should_stop`` ended training early.

    Example:
        >>> import itertools, jax, jax.numpy as jnp, optax
        >>> from wsbcn_flax.training import LoopConfig, TrainState, fit, make_train_step
        >>> def loss_fn(params, batch_stats, batch, *, rng):
        ...     return jnp.mean((params["w"] - batch["x"]) ** 2), (batch_stats, {})
        >>> optimizer = optax.sgd(0.5)
        >>> step = jax.jit(make_train_step(loss_fn, optimizer))
        >>> state = TrainState.create({"params": {"w": jnp.zeros(())}}, optimizer)
        >>> state, _ = fit(step, state, lambda done: itertools.repeat({"x": jnp.ones(4)}),
        ...                config=LoopConfig(steps=3, show_progress=False))
        >>> int(state.step), float(state.params["w"])
        (3, 1.0)
    """
    writer = writer or MultiWriter()
    done, results = int(state.step), {}
    if done > config.steps:
        raise ValueError(
            f"Training ends at step {config.steps}, and the state it received is at step {done}. "
            "Train longer, or start in another folder."
        )
    progress = Progress("train", total=config.steps, start=done, enabled=config.show_progress)
    with progress, _closing(make_batches(done)) as batches:
        previous = None
        if done == config.steps and evaluate is not None:
            results = _evaluated(evaluate, state, done)
        if done < config.steps:
            progress.note("compiling the step")
        for number in range(done + 1, config.steps + 1):
            state, metrics = step(state, _next(batches, number, config.steps))
            if previous is not None:
                _check_finite(*previous, checkpointer)
            previous = (number, metrics)
            progress.update(number, {**metrics, **results})
            is_last = number == config.steps
            stops = should_stop(number) and not is_last
            is_due = {
                "log": is_last or number % config.log_every == 0,
                "eval": is_last or _divides(config.eval_every, number),
                "checkpoint": is_last or stops or _divides(config.checkpoint_every, number),
            }
            if not any(is_due.values()):
                continue
            values, failure = _check_finite(number, metrics, checkpointer), None
            if is_due["eval"] and evaluate is not None:
                try:
                    results = _evaluated(evaluate, state, number)
                except NonFiniteLossError as error:
                    results, failure = {}, error  # Raised after the steps until here are saved.
                values |= results
            if is_due["log"] or (is_due["eval"] and evaluate is not None):
                writer.write(number, values)
            if is_due["checkpoint"] and checkpointer is not None:
                checkpointer.save(number, state, extra={"metrics": results})
            if failure is not None:
                raise failure
            if stops:
                saved = "was not saved" if checkpointer is None else "is saved; run again to resume"
                raise PreemptedError(f"Training was asked to stop at step {number}, which {saved}.")
    return state, results


def _check_finite(
    number: int, metrics: Mapping[str, jax.Array], checkpointer: Checkpointer | None
) -> dict[str, float]:
    values = as_floats(metrics)
    if bad := non_finite(values):
        steps = () if checkpointer is None else checkpointer.steps
        kept = (
            f"The checkpoint of step {steps[-1]} is intact, but from there the same run ends here"
            if steps
            else "No checkpoint was saved"
        )
        raise NonFiniteLossError(
            f"Training needs finite losses and gradients, received {bad} at step {number}. {kept}. "
            "Train in another folder with a lower learning rate (--out NEW --optim.learning-rate "
            "LOWER) or a longer warmup, or look for bad values in the data, such as NaN or labels "
            "outside the classes."
        )
    return values


def _next(batches: Iterator[Batch], number: int, steps: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"Training to step {steps} needs a batch for every step, received none for step "
            f"{number}. make_batches must return an iterator that starts the data over as often as "
            "needed."
        ) from None


def _evaluated(evaluate, state: TrainState, number: int) -> dict[str, float]:
    metrics = check_evaluation(as_floats(evaluate(state)), where=f" at step {number}")
    return {f"eval_{name}": value for name, value in metrics.items()}


def _divides(interval: int | None, number: int) -> bool:
    return interval is not None and number % interval == 0


@contextlib.contextmanager
def _closing(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Closes an iterator that can be closed, to end the threads of grain's iterators."""
    try:
        yield batches
    finally:
        getattr(batches, "close", lambda: None)()
