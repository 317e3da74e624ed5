"""Normalizations to compare with, as modules that are injected like any other."""

import flax.linen as nn
import jax
from jax import lax


class NaiveBatchChannelNorm(nn.Module):
    """Flax's batch normalization followed by its group normalization: two passes over everything.

    Attributes:
        num_groups: groups of the second; divides the channels.
        epsilon: added to both variances.
        momentum: of the running statistics.
        dtype: of the output; that of x if None.
        use_running_average: evaluation.
        scale_init: initializer of the second's scale.
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

    The barrier keeps XLA for TPU from tiling the normalization as its convolutions are tiled, which
    at two images a chip writes the broadcast scale and offset out at the activation's size.
    """

    def __call__(self, x, use_running_average=None, *, mask=None):
        """Normalizes x as ``nn.BatchNorm`` does."""
        return super().__call__(lax.optimization_barrier(x), use_running_average, mask=mask)


class NoNorm(nn.Module):
    """The identity, called like a normalization: the floor of what a network costs.

    Attributes:
        scale_init: ignored, as there is no scale.
        dtype: ignored.
    """

    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: jax.typing.DTypeLike | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """X itself."""
        return x
