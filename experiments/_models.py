"""From a recipe's configuration to a model and the transform of its parameters."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from experiments._recipes import NormConfig, Recipe, WeightConfig
from wsbcn_flax import BatchChannelNorm, WeightStandardization
from wsbcn_flax.models import BasicBlock, CifarResNet, PreActBlock

_BLOCKS = {"basic": BasicBlock, "preact": PreActBlock}


def make_norm(config: NormConfig) -> Callable[..., nn.Module]:
    """The normalization a configuration names, to inject into a model."""
    match config.kind:
        case "bn":
            return functools.partial(nn.BatchNorm, momentum=1 - config.rate, epsilon=1e-5)
        case "gn":
            return functools.partial(nn.GroupNorm, num_groups=config.groups, epsilon=1e-5)
        case "ln":
            return functools.partial(nn.GroupNorm, num_groups=1, epsilon=1e-5)
        case "in":
            return functools.partial(nn.GroupNorm, num_groups=None, group_size=1, epsilon=1e-5)
        case "bcn":
            return functools.partial(
                BatchChannelNorm,
                num_groups=config.groups,
                statistics=config.statistics,
                order=config.order,
                rate=config.rate,
            )


def make_transform(config: WeightConfig) -> WeightStandardization | None:
    """The parameter transform a configuration names."""
    if config.kind == "none":
        return None
    return WeightStandardization(preset=config.preset if config.kind == "ws" else config.kind)


def make_model(recipe: Recipe, *, num_classes: int) -> CifarResNet:
    """A plain network with the recipe's normalization; kernels are the transform's business."""
    return CifarResNet(
        depth=recipe.model.depth,
        num_classes=num_classes,
        width=recipe.model.width,
        stem_strides=recipe.model.stem_strides,
        block=_BLOCKS[recipe.model.block],
        norm=make_norm(recipe.norm),
        dtype=jnp.dtype(recipe.model.dtype),
    )
