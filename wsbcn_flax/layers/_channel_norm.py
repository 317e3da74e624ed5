"""Channel normalization, which is group normalization, as a replacement for nn.GroupNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from wsbcn_flax.ops import channel_norm
from wsbcn_flax.ops._checks import check_activation


class ChannelNorm(nn.Module):
    """Channel normalization, a replacement for ``nn.GroupNorm``.

        y = scale (x - E[x]) / sqrt(Var[x] + epsilon) + bias

    with E and Var over the positions and channels of each group of each sample. It has
    ``nn.GroupNorm``'s arguments, parameters (``scale`` and ``bias`` [C]) and results.
    ``wsbcn_flax.ops.channel_norm`` computes them in one reduction pass and one elementwise pass,
    with derivatives in closed form. Two things differ. The output has the dtype of ``x`` unless
    ``dtype`` is given, and a mask has a channel axis of 1.

    Attributes:
        num_groups: Number of groups, which divides C and leaves each more than one value; None if
            ``group_size`` is given.
        group_size: Number of channels in a group, in place of ``num_groups``.
        epsilon: Constant added to the variance.
        dtype: Output dtype; defaults to the dtype of ``x``.
        param_dtype: Dtype of the parameters.
        use_bias: Whether there is a bias.
        use_scale: Whether there is a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.

    Raises:
        TypeError: If x is not floating-point, or ``num_groups`` not a whole number.
        ValueError: Unless exactly one of ``num_groups`` and ``group_size`` is given; for groups
            that do not divide C or hold one value, rank 1, an empty axis, or a mask of another
            shape.

    References:
        Wu, He, Group Normalization, https://arxiv.org/abs/1803.08494

    Example:
        >>> import jax
        >>> from wsbcn_flax import ChannelNorm
        >>> x = 5 + jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
        >>> y, variables = ChannelNorm(num_groups=32).init_with_output(jax.random.key(1), x)
        >>> jax.tree.map(jax.numpy.shape, variables)
        {'params': {'bias': (64,), 'scale': (64,)}}
        >>> bool(abs(y.mean()) < 1e-5)
        True
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes x [B, ..., C].

        Args:
            x: Activations, floating-point.
            mask: Mask that broadcasts to x with a channel axis of 1; true or 1 where a position
                counts.

        Returns:
            An array of x's shape, in ``dtype``.
        """
        check_activation(x, caller="ChannelNorm")
        features = x.shape[-1]
        if (self.num_groups is None) == (self.group_size is None):
            raise ValueError(
                "ChannelNorm needs exactly one of num_groups and group_size, received "
                f"num_groups={self.num_groups} and group_size={self.group_size}. Set one to None."
            )
        num_groups = self.num_groups
        if self.group_size is not None:
            if self.group_size < 1 or features % self.group_size:
                raise ValueError(
                    "ChannelNorm needs group_size to divide the number of channels, received "
                    f"group_size={self.group_size} for {features} channels."
                )
            num_groups = features // self.group_size
        assert num_groups is not None
        shape = (features,)
        bias = (
            self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        )
        scale = (
            self.param("scale", self.scale_init, shape, self.param_dtype)
            if self.use_scale
            else None
        )
        return channel_norm(
            x,
            scale,
            bias,
            num_groups=num_groups,
            epsilon=self.epsilon,
            mask=mask,
            dtype=self.dtype,
        )
