"""The box head of Faster and Mask R-CNN."""

import flax.linen as nn
import jax

from wsbcn_flax.models._layers import ModuleFactory, bind_mode, make_conv, maker
from wsbcn_flax.models.detection._fpn import kernel_init as uniform_init
from wsbcn_flax.ops._checks import statistics_dtype


class BoxHead(nn.Module):
    """The box head: class logits and box deltas of every region.

    It applies a 3x3 convolution, a normalization and ReLU four times, then a dense layer and ReLU.
    Two more dense layers, in float32 or wider, compute logits and deltas. Kernels of convolutions
    and logits start normal with standard deviation 0.01, those of deltas with 0.001. The first
    dense layer starts uniform with variance 1 / fan-in.

    Submodules: ``conv{i}`` and ``norm{i}`` with i from 1 to 4, ``fc6``, ``logits``, ``deltas``.

    Attributes:
        num_classes: Number of object classes, without the background.
        features: Number of channels of the convolutions.
        hidden: Number of channels of the first dense layer.
        conv, norm, dtype: As in ``FPN``.

    References:
        Wu and He, Group Normalization, https://arxiv.org/abs/1803.08494, for the convolutions

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax.models.detection import BoxHead
        >>> head = BoxHead(80, features=32, hidden=64, norm=nn.GroupNorm)
        >>> regions = jnp.ones((5, 7, 7, 32))
        >>> (logits, deltas), _ = head.init_with_output(jax.random.key(0), regions, train=False)
        >>> logits.shape, deltas.shape
        ((5, 81), (5, 81, 4))
    """

    num_classes: int
    features: int = 256
    hidden: int = 1024
    conv: ModuleFactory = nn.Conv
    norm: ModuleFactory = nn.BatchNorm
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Computes logits [N, K + 1] and deltas [N, K + 1, 4]; class 0 is the background.

        Args:
            x: Features of regions [N, 7, 7, C].
            train: Whether normalizations use and update training statistics.
        """
        normal = nn.initializers.normal
        conv = maker("conv", self.conv, dtype=self.dtype)
        norm = bind_mode(maker("norm", self.norm, dtype=self.dtype), train=train)
        for i in range(1, 5):
            x = make_conv(conv, self.features, 3, kernel_init=normal(0.01), name=f"conv{i}")(x)
            x = nn.relu(norm(name=f"norm{i}")(x))
        x = x.reshape(len(x), -1)
        x = nn.Dense(self.hidden, kernel_init=uniform_init, dtype=self.dtype, name="fc6")(x)
        x = nn.relu(x)
        x = x.astype(statistics_dtype(x.dtype))
        classes = self.num_classes + 1
        logits = nn.Dense(classes, kernel_init=normal(0.01), name="logits")(x)
        deltas = nn.Dense(4 * classes, kernel_init=normal(0.001), name="deltas")(x)
        return logits, deltas.reshape(len(x), classes, 4)
