"""The body of every residual network: activation of the stem, stages of blocks, last activation."""

from collections.abc import Callable, Sequence
from typing import cast

import flax.linen as nn
import jax

from wsbcn_flax.models._blocks import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck
from wsbcn_flax.models._layers import ModuleFactory

Block = BasicBlock | Bottleneck | PreActBlock | PreActBottleneck


def probe(block: ModuleFactory, features: int) -> Block:
    """A block bound to nothing, to read ``depth`` and ``preactivation`` from.

    An instance has them whether ``block`` is a class, a partial of one, or either under
    ``nn.remat``; and making one checks its fields before any array is seen.
    """
    fields = {"conv": nn.Conv, "norm": nn.LayerNorm, "parent": None}
    return cast(Block, block(features, **fields))


def residual_stages(
    x: jax.Array,
    *,
    stage_sizes: Sequence[int],
    features: int,
    block: ModuleFactory,
    norm: ModuleFactory,
    pool: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Activations [B, h, w, features 2^(stages - 1)] from the stem's convolution x [B, H, W, C].

    Each stage but the first halves the resolution and doubles the channels. The blocks,
    ``stage{s}_block{b}``, are submodules of whichever calls this, and so is the one normalization
    outside them: ``stem_norm`` before ``pool``, or, if the blocks activate first, ``last_norm``.

    Args:
        x: what the stem's convolution computed.
        stage_sizes: blocks in each stage.
        features: channels that the first stage's blocks return.
        block: makes a block, called with its features, ``strides`` and ``name``.
        norm: makes a normalization in the right mode, called with ``name``.
        pool: applied once, after the stem's activation.
    """
    preactivation = probe(block, features).preactivation
    if not preactivation:
        x = nn.relu(norm(name="stem_norm")(x))
    x = pool(x)
    for stage, size in enumerate(stage_sizes):
        for index in range(size):
            x = block(
                features * 2**stage,
                strides=2 if stage > 0 and index == 0 else 1,
                name=f"stage{stage + 1}_block{index + 1}",
            )(x)
    if preactivation:
        x = nn.relu(norm(name="last_norm")(x))
    return x
