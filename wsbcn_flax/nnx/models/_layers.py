"""Parts that all networks share: convolutions, stages of blocks and the head."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wsbcn_flax.models._layers import kernel_init
from wsbcn_flax.ops._checks import statistics_dtype

LayerFactory = Callable[..., Any]


class Stages(nnx.Module):
    """Stages of blocks and a head; the attributes have the names of Linen's submodules."""

    def __init__(
        self,
        sizes: Sequence[int],
        in_features: int,
        features: int,
        *,
        block: LayerFactory,
        num_classes: int | None,
        conv: LayerFactory,
        norm: LayerFactory,
        rngs: nnx.Rngs,
    ):
        self.stage_sizes = tuple(sizes)
        self.num_classes = num_classes
        make = functools.partial(block, conv=conv, norm=norm, rngs=rngs)
        for stage, size in enumerate(sizes, start=1):
            for index in range(1, size + 1):
                strides = 2 if stage > 1 and index == 1 else 1
                after = features * 2 ** (stage - 1)
                layer = make(in_features, after, strides=strides)
                setattr(self, f"stage{stage}_block{index}", layer)
                in_features = after
        if num_classes is not None:
            self.head = nnx.Linear(in_features, num_classes, rngs=rngs)

    def after_stem(self, x: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        """Maps the stem's features x [B, H, W, C] to logits, or to the features of every stage."""
        outputs = []
        for stage, size in enumerate(self.stage_sizes, start=1):
            for index in range(1, size + 1):
                x = getattr(self, f"stage{stage}_block{index}")(x)
            outputs.append(x)
        if self.num_classes is None:
            return tuple(outputs)
        return self.head(jnp.mean(x, axis=(1, 2), dtype=statistics_dtype(x.dtype)))


def make_conv(
    conv: LayerFactory,
    in_features: int,
    features: int,
    size: int,
    *,
    strides: int = 1,
    groups: int = 1,
    rngs: nnx.Rngs,
) -> Any:
    """Makes a convolution of size x size without bias, padded on every side as in PyTorch."""
    return conv(
        in_features,
        features,
        (size, size),
        strides=strides,
        padding=(size - 1) // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=kernel_init,
        rngs=rngs,
    )
