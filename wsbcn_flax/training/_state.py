"""Everything a training run carries from step to step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training.dynamic_scale import DynamicScale


@struct.dataclass
class TrainState:
    """The explicit state of a run: a pytree, replaced by each step and never mutated.

    Attributes:
        step: [] int32, optimizer steps taken.
        params: the model's parameters, raw where a transform standardizes them.
        batch_stats: running statistics; empty for a model that has none.
        opt_state: the optimizer's state.
        loss_scale: for float16, Flax's dynamic scale; None for no scaling.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    loss_scale: DynamicScale | None = None

    @classmethod
    def create(
        cls,
        variables: Mapping[str, Any],
        optimizer: optax.GradientTransformation,
        *,
        loss_scale: DynamicScale | None = None,
    ) -> "TrainState":
        """The state before the first step, from what ``model.init`` returned.

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
        )
