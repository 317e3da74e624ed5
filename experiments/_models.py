"""Networks, normalizations and transforms by the names that recipes give them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments._baselines import BarrierBatchNorm, NaiveBatchChannelNorm, NoNorm
from experiments._recipe import ModelConfig, NormConfig, Recipe, WeightConfig
from wsbcn_flax import BatchChannelNorm, WeightStandardization, models
from wsbcn_flax.transforms import ConvolutionKernel, normalized_convolutions

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"resnet{depth}": functools.partial(models.CifarResNet, depth=depth)
        for depth in (8, 20, 32, 44, 56, 110)
    },
    "preresnet110": models.PreResNet110,
    "preresnet164": models.PreResNet164,
    "resnext29_8x64d": models.ResNeXt29_8x64d,
    "wrn28_10": models.WRN28_10,
    "vgg16": models.VGG16,
    "vgg19": models.VGG19,
    "densenet100_12": models.DenseNetBC100_12,
    "resnet18": models.ResNet18,
    "resnet34": models.ResNet34,
    "resnet50": models.ResNet50,
    "resnet101": models.ResNet101,
    "resnet152": models.ResNet152,
    "resnext50_32x4d": models.ResNeXt50_32x4d,
    "resnext101_32x4d": models.ResNeXt101_32x4d,
}


@functools.lru_cache(maxsize=64)  # Equal networks get one maker, so that they are traced once.
def make_norm(config: NormConfig, *, axis_name: str | None = None) -> Callable[..., nn.Module]:
    """Makes the normalization that a configuration names, to inject into a model.

    Synced statistics are averaged over the device axis ``axis_name``.
    """
    batch = {"momentum": 1 - config.rate, "epsilon": 1e-5}
    match config.kind:
        case "bn":
            synced = axis_name if config.sync else None
            return functools.partial(nn.BatchNorm, axis_name=synced, **batch)
        case "bn_barrier":
            return functools.partial(BarrierBatchNorm, **batch)
        case "naive_bcn":
            return functools.partial(NaiveBatchChannelNorm, config.groups, **batch)
        case "none":
            return NoNorm
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
                affine=config.affine,
                axis_name=axis_name if config.sync else None,
            )


def make_transform(
    config: WeightConfig, *, model: nn.Module, image_shape: tuple[int, ...]
) -> WeightStandardization | None:
    """Makes the parameter transform that a configuration names, for the kernels of a network.

    The network is traced on images [1, H, W, C] to find the kernels that a normalization follows.
    Any network with the same convolutions will do.
    """
    if config.kind == "none":
        return None
    where = _convolutions(model, (1, *image_shape))
    return WeightStandardization(preset=config.convention, where=where)


@functools.lru_cache(maxsize=64)
def _convolutions(model: nn.Module, shape: tuple[int, ...]) -> tuple[ConvolutionKernel, ...]:
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return normalized_convolutions(model, images, train=False)


def make_model(recipe: Recipe, *, num_classes: int, axis_name: str | None = None) -> nn.Module:
    """Makes a recipe's network with its normalization and plain convolutions.

    Raises:
        ValueError: For an unknown network, or an option that it does not have.
    """
    config = recipe.model
    if config.name not in MODELS:
        raise ValueError(
            f"model.name must be one of {', '.join(MODELS)}, received {config.name!r}."
        )
    model = MODELS[config.name]
    return model(
        num_classes=num_classes,
        norm=make_norm(recipe.norm, axis_name=axis_name),
        dtype=jnp.dtype(config.dtype),
        **_own_options(config, model),
    )


def _own_options(config: ModelConfig, model: Callable[..., nn.Module]) -> dict[str, Any]:
    """Returns the options that were given, all of which the network must have."""
    options = {"width": config.width, "stem_strides": config.stem_strides}
    given = {name: value for name, value in options.items() if value is not None}
    own = inspect.signature(model).parameters
    if unknown := set(given) - set(own):
        raise ValueError(
            f"model.width and model.stem_strides are for CIFAR residual networks, received "
            f"{', '.join(sorted(unknown))} for {config.name}. Leave them out."
        )
    if not config.remat:
        return given
    if "block" not in own:
        raise ValueError(
            f"model.remat is for networks of residual blocks, received {config.name}. Leave it out."
        )
    return {**given, "block": rematerialized(own["block"].default)}


def rematerialized(block: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    if isinstance(block, functools.partial):
        return functools.partial(rematerialized(block.func), *block.args, **block.keywords)
    return nn.remat(cast(type[nn.Module], block))
