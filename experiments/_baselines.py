"""Normalizations to compare with, as modules that are injected like any other."""

import flax.linen as nn
import jax
from jax import lax


class NaiveBatchChannelNorm(nn.Module):
    """Flax's batch normalization followed by its group normalization, in two passes over x.

    Attributes:
        num_groups: Number of groups of the group normalization; divides the channels.
        epsilon: Constant that is added to both variances.
        momentum: Decay of the running statistics.
        dtype: Output dtype; defaults to the dtype of ``x``.
        use_running_average: Whether to normalize by the running statistics, as in evaluation.
        scale_init: Initializer of the group normalization's scale.
    """

    num_groups: int
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: jax.typing.DTypeLike | None = None
    use_running_average: bool = False
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [B, ..., C] and updates the running statistics."""
        x = nn.BatchNorm(
            use_running_average=self.use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )(x)
        return nn.GroupNorm(
            self.num_groups, epsilon=self.epsilon, dtype=self.dtype, scale_init=self.scale_init
        )(x)


class BarrierBatchNorm(nn.BatchNorm):
    """Flax's batch normalization behind an optimization barrier.

    The barrier keeps XLA for TPU from tiling the normalization like its convolutions. At two images
    a chip, that tiling writes the broadcast scale and offset out at the activation's size.
    """

    def __call__(self, x, use_running_average=None, *, mask=None):
        """Normalizes x as ``nn.BatchNorm`` does."""
        return super().__call__(lax.optimization_barrier(x), use_running_average, mask=mask)


class NoNorm(nn.Module):
    """The identity, to measure what a network costs without any normalization.

    Attributes:
        scale_init: Unused initializer, which other normalizations take.
        dtype: Unused output dtype, which other normalizations take.
    """

    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: jax.typing.DTypeLike | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x`` unchanged."""
        return x
