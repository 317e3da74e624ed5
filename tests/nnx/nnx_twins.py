"""Every public NNX layer and model with its Linen twin, for tests that run over all of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from oracles import normal

import wsbcn_flax
from wsbcn_flax import models
from wsbcn_flax.nnx import BatchChannelNorm, WSConv, WSConvTranspose, WSLinear, load_variables
from wsbcn_flax.nnx import models as nnx_models


@dataclasses.dataclass(frozen=True)
class Twin:
    """One way to build one layer or model in both libraries.

    Attributes:
        name: Name of the module in NNX.
        linen: Function from a computation dtype to the Linen module.
        make: Function ``(dtype=..., rngs=...)`` to the NNX module, in the mode of training.
        shape: Shape of the input.
        call: Keyword arguments of the Linen module's call in training.
    """

    name: str
    linen: Callable[[Any], Any]
    make: Callable[..., Any]
    shape: tuple[int, ...]
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def example(self, dtype=jnp.float32):
        return 0.5 + normal(1, *self.shape, dtype=dtype)

    @functools.cached_property
    def variables(self):
        """Variables of both, with every parameter moved from where it starts."""
        init = functools.partial(self.linen(None).init, **self.call)
        variables = dict(jax.jit(init)(jax.random.key(0), self.example()))
        leaves, structure = jax.tree.flatten(variables["params"])
        moved = [leaf + 0.05 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
        return {**variables, "params": jax.tree.unflatten(structure, moved)}

    def model(self, dtype=None, variables=None):
        model = self.make(dtype=dtype, rngs=nnx.Rngs(0))
        load_variables(model, self.variables if variables is None else variables)
        return model


def _layer(linen, make, features, *args, shape, **options):
    """Makes a layer with the number of channels of its input."""
    return Twin(
        make.__name__,
        lambda dtype: linen(features, *args, dtype=dtype, **options),
        functools.partial(make, shape[-1], features, *args, **options),
        shape,
    )


def _norm(**options):
    return Twin(
        "BatchChannelNorm",
        lambda dtype: wsbcn_flax.BatchChannelNorm(
            num_groups=2, use_running_average=False, dtype=dtype, **options
        ),
        functools.partial(BatchChannelNorm, 4, num_groups=2, **options),
        (3, 5, 6, 4),
    )


def _block(name, **options):
    conv, norm = wsbcn_flax.WSConv, functools.partial(wsbcn_flax.BatchChannelNorm, num_groups=2)

    def linen(dtype):
        return getattr(models, name)(
            8,
            conv=functools.partial(conv, dtype=dtype),
            norm=functools.partial(norm, use_running_average=False, dtype=dtype),
            **options,
        )

    def make(*, dtype, rngs):
        return getattr(nnx_models, name)(
            4,
            8,
            conv=functools.partial(WSConv, dtype=dtype),
            norm=functools.partial(BatchChannelNorm, num_groups=2, dtype=dtype),
            rngs=rngs,
            **options,
        )

    return Twin(name, linen, make, (2, 6, 6, 4))


def _network(name, shape, block, **options):
    norm = functools.partial(wsbcn_flax.BatchChannelNorm, num_groups=4)
    return Twin(
        name,
        lambda dtype: getattr(models, name)(
            conv=wsbcn_flax.WSConv, norm=norm, dtype=dtype, block=getattr(models, block), **options
        ),
        functools.partial(
            getattr(nnx_models, name),
            conv=WSConv,
            norm=functools.partial(BatchChannelNorm, num_groups=4),
            block=getattr(nnx_models, block),
            **options,
        ),
        shape,
        {"train": True},
    )


IMAGES = (2, 5, 6, 4)
LAYERS = {
    "conv": _layer(wsbcn_flax.WSConv, WSConv, 6, (3, 3), strides=2, shape=IMAGES),
    "conv_nfnet": _layer(
        wsbcn_flax.WSConv,
        WSConv,
        6,
        (3,),
        feature_group_count=2,
        use_bias=False,
        preset="nfnet",
        shape=(2, 7, 4),
    ),
    "conv_transpose": _layer(
        wsbcn_flax.WSConvTranspose,
        WSConvTranspose,
        6,
        (2, 2),
        strides=(2, 2),
        transpose_kernel=True,
        preset="nfnet",
        shape=IMAGES,
    ),
    "linear": _layer(wsbcn_flax.WSDense, WSLinear, 6, shape=(2, 5, 4)),
    "norm": _norm(),
    "norm_update_first": _norm(order="update_first", affine="channel"),
    "norm_batch": _norm(statistics="batch", rate=lambda count: 1 / (count + 1)),
}
MODELS = {
    "basic_block": _block("BasicBlock", strides=2),
    "bottleneck": _block("Bottleneck", groups=2),
    "cifar_resnet": _network("CifarResNet", (2, 8, 8, 3), "BasicBlock", depth=8, width=8),
    "resnet": _network(
        "ResNet",
        (2, 16, 16, 3),
        "Bottleneck",
        stage_sizes=(1, 1),
        features=16,
        stem_features=8,
        num_classes=3,
    ),
}
TWINS = {**LAYERS, **MODELS}
