"""Everything a training run carries from step to step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training.dynamic_scale import DynamicScale

from wsbcn_flax.tasks import Batch, Task


@struct.dataclass
class TrainState:
    """The explicit state of a run: a pytree, replaced by each step and never mutated.

    Attributes:
        step: Number of optimizer steps taken, [] int32.
        params: Parameters of the model, raw where a transform standardizes them.
        batch_stats: Running statistics; empty for a model that has none.
        opt_state: State of the optimizer.
        loss_scale: Flax's dynamic scale for float16; None for no scaling.
        extra: Arrays that belong to the task; see ``wsbcn_flax.tasks.Task``.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    loss_scale: DynamicScale | None = None
    extra: Any = None

    @classmethod
    def create(
        cls,
        variables: Mapping[str, Any],
        optimizer: optax.GradientTransformation,
        *,
        loss_scale: DynamicScale | None = None,
    ) -> "TrainState":
        """Makes the state before the first step from what ``model.init`` returned.

        Example:
            >>> import jax.numpy as jnp, optax
            >>> from wsbcn_flax.training import TrainState
            >>> state = TrainState.create({"params": {"w": jnp.ones(2)}}, optax.sgd(0.1))
            >>> int(state.step), state.batch_stats
            (0, {})
        """
        params = variables["params"]
        if loss_scale is not None:  # Its numbers are Python's, whose dtypes would change later.
            loss_scale = loss_scale.replace(
                fin_steps=jnp.asarray(loss_scale.fin_steps, jnp.int32),
                scale=jnp.asarray(loss_scale.scale, jnp.float32),
            )
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
            loss_scale=loss_scale,
            extra=variables.get("extra"),
        )


def init_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch: Batch,
    *,
    transform: Callable[[Any], Any] | None = None,
    loss_scale: DynamicScale | None = None,
) -> TrainState:
    """Makes the state before a task's first step, its ``extra`` included.

    Args:
        task: Task to train.
        optimizer: Any optax transformation.
        key: Key of the initialization.
        batch: A batch of the shapes to train on; its values do not matter.
        transform: Transform of the parameters in training; where it learns gains, such as
            ``WeightStandardization("nfnet")``, they are added.
        loss_scale: Flax's dynamic scale for float16; None for no scaling.
    """
    variables = dict(task.init(key, batch))
    with_gains = getattr(transform, "with_gains", lambda params: params)
    variables["params"] = with_gains(variables["params"])
    state = TrainState.create(variables, optimizer, loss_scale=loss_scale)
    if hasattr(task, "after_update"):
        state = dataclasses.replace(state, extra=task.after_update(state))
    return state
