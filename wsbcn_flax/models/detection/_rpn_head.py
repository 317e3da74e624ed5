"""The region proposal network."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from wsbcn_flax.ops._checks import statistics_dtype


class RPNHead(nn.Module):
    """The region proposal network: objectness and box deltas of every anchor.

    A 3x3 convolution and ReLU, then 1x1 convolutions to logits and to deltas in float32 or wider,
    share their parameters over all levels. The convolutions have biases, and no normalization
    follows them. Kernels start normal with standard deviation 0.01.

    Submodules: ``conv``, ``logits`` and ``deltas``.

    Attributes:
        features: Number of channels of the 3x3 convolution.
        num_anchors: Number of anchors at each position.
        dtype: Computation dtype of the 3x3 convolution.

    References:
        Ren et al., Faster R-CNN, https://arxiv.org/abs/1506.01497

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.models.detection import RPNHead
        >>> levels = [jnp.ones((1, 8, 8, 16)), jnp.ones((1, 4, 4, 16))]
        >>> outputs, _ = RPNHead(16).init_with_output(jax.random.key(0), levels)
        >>> [(logits.shape, deltas.shape) for logits, deltas in outputs]
        [((1, 192), (1, 192, 4)), ((1, 48), (1, 48, 4))]
    """

    features: int = 256
    num_anchors: int = 3
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        """Computes logits [B, HWA] and deltas [B, HWA, 4] of each level [B, H, W, C].

        Anchors are ordered by row, then by column, then by their number at a position.
        """
        init = nn.initializers.normal(0.01)
        conv = nn.Conv(
            self.features, (3, 3), padding=1, kernel_init=init, dtype=self.dtype, name="conv"
        )
        logits = nn.Conv(self.num_anchors, (1, 1), kernel_init=init, name="logits")
        deltas = nn.Conv(4 * self.num_anchors, (1, 1), kernel_init=init, name="deltas")

        def head(level: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = nn.relu(conv(level))
            x = x.astype(statistics_dtype(x.dtype))
            return logits(x).reshape(len(x), -1), deltas(x).reshape(len(x), -1, 4)

        return [head(level) for level in levels]
