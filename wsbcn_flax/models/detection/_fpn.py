"""The feature pyramid network."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from wsbcn_flax.models._layers import ModuleFactory, bind_mode, make_conv, maker
from wsbcn_flax.models._padding import Padding

# PyTorch's kaiming_uniform with a=1.
kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class FPN(nn.Module):
    """The feature pyramid network: the same number of channels at every resolution.

    Levels P are computed from the backbone's stages C, the coarsest first, with norms and without
    ReLU:

        M[i] = norm(conv1x1(C[i])) + upsample(M[i + 1])
        P[i] = norm(conv3x3(M[i]))

    ``upsample`` repeats each position twice along both axes. An extra level takes every second
    position of the coarsest P. Kernels start uniform with variance 1 / fan-in.

    Submodules: ``inner{i}_conv``, ``inner{i}_norm``, ``layer{i}_conv`` and ``layer{i}_norm``, with
    i starting at 2, the level of stride 4.

    Attributes:
        features: Number of channels of every level.
        conv: Maker of a convolution, called like ``nn.Conv``.
        norm: Maker of a normalization, as in ``ResNet``.
        dtype: Computation dtype.

    References:
        Lin et al., Feature Pyramid Networks for Object Detection, https://arxiv.org/abs/1612.03144

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.models.detection import FPN
        >>> stages = [jnp.ones((1, 16, 16, 8)), jnp.ones((1, 8, 8, 16))]
        >>> levels, _ = FPN(32).init_with_output(jax.random.key(0), stages, train=False)
        >>> [level.shape for level in levels]
        [(1, 16, 16, 32), (1, 8, 8, 32), (1, 4, 4, 32)]
    """

    features: int = 256
    conv: ModuleFactory = nn.Conv
    norm: ModuleFactory = nn.BatchNorm
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(
        self, stages: Sequence[jax.Array], *, train: bool, padding: Padding | None = None
    ) -> tuple[jax.Array, ...]:
        """Maps n stages [B, H, W, ...], each half as large as the one before, to n + 1 levels.

        Args:
            stages: Features of the backbone, the finest first.
            train: Whether normalizations use and update training statistics.
            padding: Padding of the images, to leave out of statistics; ``MaskRCNN`` makes it.
        """
        padding = padding or Padding(None, (0, 0))
        conv = maker("conv", self.conv, dtype=self.dtype)
        conv = functools.partial(make_conv, conv, self.features, kernel_init=kernel_init)
        norm = padding.leave_out_of(maker("norm", self.norm, dtype=self.dtype))
        norm = bind_mode(norm, train=train)

        levels: list[jax.Array] = []
        merged = None
        for i, stage in reversed(list(enumerate(stages, start=2))):
            inner = norm(name=f"inner{i}_norm")(conv(1, name=f"inner{i}_conv")(stage))
            # The upsampled image may reach into the padding of the finer level.
            merged = inner if merged is None else padding.fill(inner + _upsample(merged, inner))
            levels.append(norm(name=f"layer{i}_norm")(conv(3, name=f"layer{i}_conv")(merged)))
        return (*reversed(levels), levels[0][:, ::2, ::2])


def _upsample(x: jax.Array, like: jax.Array) -> jax.Array:
    """Repeats every position of x twice along both axes, cut to the size of the finer level."""
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x[:, : like.shape[1], : like.shape[2]]
