"""The state that a training run carries from step to step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from flax.training.dynamic_scale import DynamicScale

from wsbcn_flax.tasks import Batch, Task


@struct.dataclass
class TrainState:
    """The explicit state of a run: a pytree that each step replaces and nothing mutates.

    Attributes:
        step: Number of optimizer steps taken, [] int32.
        params: Parameters of the model, before any transform standardizes them.
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
        if "params" not in variables:
            raise ValueError(
                'variables must be what model.init returned, with a collection "params", received '
                f"{sorted(variables)}."
            )
        params = variables["params"]
        if loss_scale is not None:  # Its numbers are Python's, so a step would change their dtypes.
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
    trained: Mapping[str, Any] | None = None,
) -> TrainState:
    """Makes the state before a task's first step, its ``extra`` included.

    Args:
        task: Task to train.
        optimizer: Any optax transformation.
        key: Key of the initialization.
        batch: A batch of the shapes to train on; its values do not matter.
        transform: Transform of the parameters in training. If it learns gains, as
            ``WeightStandardization("nfnet")`` does, they are added to the parameters.
        loss_scale: Flax's dynamic scale for float16; None for no scaling.
        trained: Variables that replace the initial ones of the same paths, such as those of a
            pretrained backbone.

    Raises:
        ValueError: For trained variables that the task does not have, or of another shape.
    """
    variables = dict(task.init(key, batch))
    with_gains = getattr(transform, "with_gains", lambda params: params)
    variables["params"] = with_gains(variables["params"])
    variables = _replaced(variables, trained or {})
    state = TrainState.create(variables, optimizer, loss_scale=loss_scale)
    if hasattr(task, "after_update"):
        state = dataclasses.replace(state, extra=task.after_update(state))
    return state


def _replaced(variables: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``variables`` with the values of ``trained`` where it has them."""
    leaves: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
    new: dict[str, Any] = traverse_util.flatten_dict(trained, sep="/")
    shapes = {name: getattr(leaves.get(name), "shape", "none") for name in new}
    if wrong := [name for name, leaf in new.items() if leaf.shape != shapes[name]]:
        raise ValueError(
            "Trained variables must have the paths and shapes of the model's own, received "
            f"{len(wrong)} of {len(new)} that differ, such as {wrong[0]} of shape "
            f"{new[wrong[0]].shape} for {shapes[wrong[0]]}; are they of another architecture or "
            "normalization?"
        )
    given = {name: jnp.asarray(leaf, leaves[name].dtype) for name, leaf in new.items()}
    return dict(traverse_util.unflatten_dict(leaves | given, sep="/"))
