"""What a task gives the one training loop, and classification."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from wsbcn_flax.training._micro_batches import Batch, Metrics


class Task(Protocol):
    """A model, its loss and its evaluation, as pure functions of parameters and statistics."""

    def init(self, key: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """The model's variables for batches shaped like ``batch``, whatever their values."""
        ...

    def loss_fn(
        self, params: Any, batch_stats: Any, batch: Batch, *, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """The batch's mean loss, with its new batch_stats and its mean metrics."""
        ...

    def eval_fn(self, params: Any, batch_stats: Any, batch: Batch) -> Metrics:
        """Sums over the batch's valid samples, and how many those are as ``count``."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Softmax cross-entropy on batches of ``image`` [B, H, W, C] and ``label`` [B].

    Attributes:
        model: called as ``model.apply(variables, images, train=...)``, returning logits [B, K].
        label_smoothing: probability spread evenly over all classes in the training loss.

    Raises:
        ValueError: for label smoothing outside [0, 1).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import CifarResNet
        >>> from wsbcn_flax.training import Classification
        >>> task = Classification(model=CifarResNet(depth=8, width=4))
        >>> batch = {"image": jnp.ones((2, 8, 8, 1)), "label": jnp.array([0, 1])}
        >>> variables = jax.jit(task.init)(jax.random.key(0), batch)
        >>> sums = task.eval_fn(**variables, batch={**batch, "mask": jnp.ones(2)})
        >>> sorted(sums)
        ['count', 'error', 'loss', 'top5_error']
    """

    model: nn.Module
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), received {self.label_smoothing}.")

    def init(self, key: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """Variables of the model for images of the batch's shape, whatever their values."""
        images = jnp.zeros((1, *batch["image"].shape[1:]), batch["image"].dtype)
        return self.model.init(key, images, train=False)

    def loss_fn(
        self, params: Any, batch_stats: Any, batch: Batch, *, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Mean cross-entropy, new batch_stats, and the fraction of errors as ``error``."""
        logits, updates = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        targets = optax.smooth_labels(
            jax.nn.one_hot(batch["label"], logits.shape[-1], dtype=logits.dtype),
            self.label_smoothing,
        )
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        error = jnp.mean(_is_wrong(logits, batch["label"]))
        return loss, (updates.get("batch_stats", {}), {"error": error})

    def eval_fn(self, params: Any, batch_stats: Any, batch: Batch) -> Metrics:
        """Sums over the samples whose ``mask`` is 1.

        The loss, top-1 errors as ``error`` and, of more than five classes, ``top5_error``.
        """
        variables = {"params": params, "batch_stats": batch_stats}
        logits = cast(jax.Array, self.model.apply(variables, batch["image"], train=False))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        valid = batch["mask"] > 0  # A selection: padding may hold anything.
        values = {"loss": loss, "error": _is_wrong(logits, batch["label"])}
        if logits.shape[-1] > 5:
            values["top5_error"] = _is_wrong(logits, batch["label"], guesses=5)
        sums = {name: jnp.sum(jnp.where(valid, value, 0)) for name, value in values.items()}
        return {**sums, "count": jnp.sum(batch["mask"])}


def _is_wrong(logits: jax.Array, label: jax.Array, *, guesses: int = 1) -> jax.Array:
    """1 where the label is not among the classes of the largest logits, else 0."""
    _, guessed = lax.top_k(logits, guesses)
    return jnp.all(guessed != label[:, None], axis=-1).astype(jnp.float32)
