"""Parts that all networks share: convolutions, normalization mode, head and input check."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from wsbcn_flax.ops._checks import statistics_dtype

ModuleFactory = Callable[..., nn.Module]

# The authors' initialization (He et al., fan-out, not truncated).
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def make_conv(
    conv: ModuleFactory,
    features: int,
    size: int,
    *,
    strides: int = 1,
    dilation: int = 1,
    groups: int = 1,
    kernel_init: nn.initializers.Initializer = kernel_init,
    name: str,
) -> nn.Module:
    """Makes a convolution of size x size without bias, padded on every side as in PyTorch."""
    return conv(
        features,
        (size, size),
        strides=strides,
        padding=dilation * (size - 1) // 2,
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=kernel_init,
        name=name,
    )


def maker(argument: str, make: Callable[..., Any], **options: Any) -> ModuleFactory:
    """Returns a partial of ``make``; raises TypeError for a layer, which is made already."""
    if isinstance(make, nn.Module) or not callable(make):
        raise TypeError(
            f"{argument} must be a class or function that makes layers, such as "
            f"functools.partial(BatchChannelNorm, num_groups=8), received {type(make).__name__}"
            f"{', a layer' if isinstance(make, nn.Module) else f' {make!r}'}."
        )
    return functools.partial(make, **options)


def bind_mode(norm: ModuleFactory, *, train: bool) -> ModuleFactory:
    """Sets a normalization's ``use_running_average`` if it takes that argument.

    So any of Flax's normalizations can be injected: ``nn.BatchNorm`` and ``BatchChannelNorm`` take
    it; ``nn.GroupNorm`` and ``nn.LayerNorm``, the same in training and evaluation, do not.
    """
    if "use_running_average" in inspect.signature(norm).parameters:
        return functools.partial(norm, use_running_average=not train)
    return norm


def classify(x: jax.Array, num_classes: int, *, mask: jax.Array | None = None) -> jax.Array:
    """Computes logits [B, num_classes] from the mean of x [B, H, W, C], in float32 or wider.

    The dense layer, named ``head``, becomes a submodule of the calling module. A mask [B, H, W, 1]
    selects the positions of the mean.
    """
    x = jnp.mean(x, axis=(1, 2), dtype=statistics_dtype(x.dtype), where=mask)
    return nn.Dense(num_classes, name="head")(x)


def check_images(images: jax.Array, *, halvings: int = 0) -> None:
    """Raises TypeError or ValueError unless ``images`` are floating-point [B, H, W, C].

    ``halvings`` is how often unpadded pooling halves the resolution; one pixel must remain.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"The model needs floating-point images, received {images.dtype}. Convert and "
            "normalize them first, for example images.astype(jnp.float32) / 255."
        )
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"The model needs non-empty images [B, H, W, C], received shape {images.shape}. "
            "A single image is images[None]; grey images have C = 1."
        )
    if min(images.shape[1:3]) < 2**halvings:
        raise ValueError(
            f"The model halves the resolution {halvings} times and needs images of at least "
            f"{2**halvings}x{2**halvings}, received shape {images.shape}. Enlarge or pad them."
        )
