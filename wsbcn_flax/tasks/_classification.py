"""Image classification."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from wsbcn_flax.ops._checks import statistics_dtype
from wsbcn_flax.tasks._mean import Mean
from wsbcn_flax.tasks._task import Batch, Metrics, Network, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """The classification task: softmax cross-entropy of ``image`` [B, H, W, C] and ``label``.

    There are two kinds of labels. Class numbers are integers [B] from 0 to K - 1. Target
    distributions are numbers [B, K], one-hot or soft as made by mixup. They are not negative and
    sum to 1, within 1 %. The error metrics compare with the most probable class of a target.

    The loss with label smoothing s is ``(1 - s) * CE(label) + s * mean_k(-log p_k)``, computed in
    float32 or wider. Any other label value, such as -1 or K, makes the loss and its gradient NaN;
    ``fit`` and ``evaluate`` then raise ``NonFiniteLossError``.

    Attributes:
        model: Network that returns logits [B, K] when called as ``model.apply(variables, images,
            train=...)``: a Linen module, or an NNX model in a ``wsbcn_flax.nnx.Functional``.
        label_smoothing: Probability spread evenly over all classes in the training loss.

    Raises:
        ValueError: If label smoothing is outside [0, 1). When traced, for a batch without the
            arrays named here, and for labels or logits of another shape or dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import CifarResNet
        >>> from wsbcn_flax.tasks import Classification
        >>> task = Classification(model=CifarResNet(depth=8, width=4))
        >>> batch = {"image": jnp.ones((2, 8, 8, 1)), "label": jnp.array([0, 1])}
        >>> variables = jax.jit(task.init)(jax.random.key(0), batch)
        >>> means = task.evaluate(**variables, batch={**batch, "mask": jnp.ones(2)})
        >>> sorted(means)
        ['error', 'loss', 'top5_error']
    """

    model: Network
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), received {self.label_smoothing}.")

    def init(self, key: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """Returns the model's variables for images of the batch's shape."""
        _check_names(batch, "image")
        images = jnp.zeros((1, *batch["image"].shape[1:]), batch["image"].dtype)
        return self.model.init(key, images, train=False)

    def loss(
        self, params: Any, batch_stats: Any, batch: Batch, *, rng: jax.Array, extra: Any = None
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Returns the mean cross-entropy, new batch_stats, and the top-1 error as ``error``."""
        _check_names(batch, "image", "label")
        logits, updates = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        logits, label = _checked(logits, batch["label"])
        loss = jnp.mean(_cross_entropy(logits, label, smoothing=self.label_smoothing))
        error = jnp.mean(_is_wrong(logits, label))
        return loss, (updates.get("batch_stats", {}), {"error": error})

    def evaluate(self, params: Any, batch_stats: Any, batch: Batch) -> dict[str, Mean]:
        """Returns means over the samples whose ``mask`` [B] is 1; other samples may hold anything.

        The means are the loss, the top-1 error as ``error`` and, with more than five classes,
        ``top5_error``.
        """
        _check_names(batch, "image", "label", "mask")
        variables = {"params": params, "batch_stats": batch_stats}
        logits = self.model.apply(variables, batch["image"], train=False)
        logits, label = _checked(logits, batch["label"])
        if batch["mask"].shape != label.shape[:1]:
            raise ValueError(
                f"mask must have one number for each sample, shape {label.shape[:1]}, received "
                f"{batch['mask'].shape}."
            )
        values = {"loss": _cross_entropy(logits, label), "error": _is_wrong(logits, label)}
        if logits.shape[-1] > 5:
            values["top5_error"] = _is_wrong(logits, label, guesses=5)
        return {name: Mean.of(value, weight=batch["mask"]) for name, value in values.items()}


def _check_names(batch: Batch, *names: str) -> None:
    if not set(names) <= set(batch):
        padding = ", 1 for a sample and 0 for padding" if "mask" in names else ""
        raise ValueError(
            f"Classification needs batches of {', '.join(names)}{padding}, received one of "
            f"{', '.join(batch) or 'nothing'}."
        )


def _checked(logits: Any, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Checks and casts logits (to float32 or wider) and labels (to a dtype wide enough)."""
    if getattr(logits, "ndim", None) != 2:
        found = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(f"A classifier must return logits [B, K], received {found}.")
    logits, label = jnp.asarray(logits), jnp.asarray(label)
    logits = logits.astype(statistics_dtype(logits.dtype))
    if label.shape == logits.shape[:1] and jnp.issubdtype(label.dtype, jnp.integer):
        return logits, label.astype(jnp.promote_types(label.dtype, jnp.int32))
    if label.shape == logits.shape and not jnp.issubdtype(label.dtype, jnp.complexfloating):
        return logits, label.astype(logits.dtype)
    raise ValueError(
        f"label must be class numbers, integers {logits.shape[:1]}, or target distributions "
        f"{logits.shape}, received {label.dtype} {label.shape}. Class numbers may need "
        "label.squeeze(-1) or label.astype(int); jax.nn.one_hot makes targets of them."
    )


def _cross_entropy(logits: jax.Array, label: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """Returns the loss of each sample [B]; it and its gradient are NaN for an invalid label."""
    if label.ndim == 1:  # A number that is not a class, such as -1, becomes a row of zeros.
        label = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
    total = jnp.sum(label, axis=-1, keepdims=True)
    valid = jnp.all(label >= 0, axis=-1, keepdims=True) & (abs(total - 1) < 0.01)
    # Selecting in the loss instead of the targets would make the gradient 0, not NaN.
    label = jnp.where(valid, label, jnp.nan)
    # Safe for a class that is ruled out by a logit of minus infinity.
    return optax.safe_softmax_cross_entropy(logits, optax.smooth_labels(label, smoothing))


def _is_wrong(logits: jax.Array, label: jax.Array, *, guesses: int = 1) -> jax.Array:
    """Returns 1 where the label is not among the classes of the largest logits, else 0."""
    if label.ndim == 2:
        label = jnp.argmax(label, axis=-1)
    _, guessed = lax.top_k(logits, guesses)
    return jnp.all(guessed != label[:, None], axis=-1).astype(jnp.float32)
