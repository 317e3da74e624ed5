"""Dynamic loss scaling for float16, with Flax's rule for the scale.

Small gradients vanish in float16 unless the loss, and so every gradient, is multiplied by a large
scale. Too large a scale makes gradients infinite. Flax's rule doubles the scale after many finite
steps and halves it after a step that is not finite.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale

from wsbcn_flax.tasks import Batch, Metrics
from wsbcn_flax.training._micro_batches import ScalarLossFn
from wsbcn_flax.training._state import TrainState


def scale_loss(loss_fn: ScalarLossFn, loss_scale: DynamicScale) -> ScalarLossFn:
    """Multiplies the loss by the scale; the metrics keep the unscaled loss."""

    def scaled_loss_fn(
        params: Any, batch_stats: Any, batch: Batch, *, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        loss, aux = loss_fn(params, batch_stats, batch, rng=rng)
        return loss * loss_scale.scale, aux

    return scaled_loss_fn


def skip_if_not_finite(
    state: TrainState, new_state: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """Takes the step if its ``grad_norm`` is finite, else skips it; adapts the scale either way.

    A skipped step still counts, since its batch is used up. It changes nothing but the step number
    and the scale.
    """
    assert state.loss_scale is not None
    # The norm stands for all gradients: Flax's rule sees a scalar that is finite if they are.
    probe = jnp.where(jnp.isfinite(metrics["grad_norm"]), 1.0, jnp.nan)
    rule = state.loss_scale.value_and_grad(lambda x: probe * x)(jnp.ones(()))
    kept = dataclasses.replace(state, step=new_state.step)
    taken = jax.tree.map(lambda new, old: jnp.where(rule.finite, new, old), new_state, kept)
    return dataclasses.replace(taken, loss_scale=rule.dynamic_scale), {
        **metrics,
        "grad_norm": jnp.where(rule.finite, metrics["grad_norm"], 0.0),
        "loss_scale": jnp.asarray(state.loss_scale.scale),
        "skipped": jnp.where(rule.finite, 0.0, 1.0),
    }
