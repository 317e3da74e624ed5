"""Everything a training run carries from step to step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """The explicit state of a run: a pytree, replaced by each step and never mutated.

    Attributes:
        step: [] int32, optimizer steps taken.
        params: the model's parameters, raw where a transform standardizes them.
        batch_stats: running statistics; empty for a model that has none.
        opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @classmethod
    def create(
        cls, variables: Mapping[str, Any], optimizer: optax.GradientTransformation
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
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
        )
