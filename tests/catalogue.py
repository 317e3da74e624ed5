"""Catalogue of every public layer and model, and of calls to them, for tests that all must pass."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from oracles import normal

from wsbcn_flax import BatchChannelNorm, ChannelNorm, WSConv, WSConvTranspose, WSDense
from wsbcn_flax.models import (
    VGG,
    BasicBlock,
    Bottleneck,
    CifarResNet,
    DenseNet,
    PreActBlock,
    PreActBottleneck,
    ResNet,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One way to build and call one public module.

    Attributes:
        name: Name of the module in its package's ``__all__``.
        make: Function from a computation dtype to the module.
        shape: Shape of the input.
        params: Names of the module's parameters.
        stats: Names of the module's running statistics.
        call: Keyword arguments of a call in training.
    """

    name: str
    make: Callable[[Any], nn.Module]
    shape: tuple[int, ...]
    params: frozenset[str]
    stats: frozenset[str] = frozenset()
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def example(self, dtype=jnp.float32, seed=1) -> jax.Array:
        return 0.5 + normal(seed, *self.shape, dtype=dtype)

    @functools.cached_property
    def variables(self):
        """Variables with every parameter, even zero scales, moved from its initial value."""
        init = functools.partial(self.make(None).init, **self.call)
        variables = dict(jax.jit(init)(jax.random.key(0), self.example()))
        leaves, structure = jax.tree.flatten(variables["params"])
        moved = [leaf + 0.05 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
        variables["params"] = jax.tree.unflatten(structure, moved)
        return variables

    @property
    def returns_logits(self) -> bool:
        """Whether the module is a network, whose output is float32 or wider in any dtype."""
        return "train" in self.call

    def apply(self, variables, x, *, dtype=None):
        """Calls the module in training with a fixed dropout key; returns output and variables."""
        y, updates = self.make(dtype).apply(
            variables,
            x,
            **self.call,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(2)},
        )
        return y, {**variables, **updates}


def _bcn(**options):
    return lambda dtype: BatchChannelNorm(
        num_groups=2, use_running_average=False, dtype=dtype, **options
    )


def _norm(dtype):
    return functools.partial(BatchChannelNorm, num_groups=2, use_running_average=False, dtype=dtype)


def _residual(block, **options):
    return lambda dtype: block(
        8, conv=functools.partial(WSConv, dtype=dtype), norm=_norm(dtype), strides=2, **options
    )


def _network(network, **options):
    """A network of WSConv, with BCN in two groups unless another norm is given."""
    options = {"norm": functools.partial(BatchChannelNorm, num_groups=2), **options}
    return lambda dtype: network(num_classes=3, conv=WSConv, dtype=dtype, **options)


_BCN = frozenset({"batch_scale", "batch_bias", "channel_scale", "channel_bias"})
_STATS = frozenset({"mean", "var", "count"})
_NETWORK_PARAMS = _BCN | {"kernel", "bias"}
_GroupNorm = functools.partial(nn.GroupNorm, num_groups=2)

CATALOGUE: dict[str, Entry] = {
    "ws_conv": Entry(
        name="WSConv",
        make=lambda dtype: WSConv(6, (3, 3), dtype=dtype),
        shape=(2, 5, 6, 4),
        params=frozenset({"kernel", "bias"}),
    ),
    "ws_conv_official": Entry(
        name="WSConv",
        make=lambda dtype: WSConv(
            6, (3,), preset="official", feature_group_count=2, use_bias=False, dtype=dtype
        ),
        shape=(2, 7, 4),
        params=frozenset({"kernel"}),
    ),
    "ws_conv_nfnet": Entry(
        name="WSConv",
        make=lambda dtype: WSConv(6, (3, 3), preset="nfnet", dtype=dtype),
        shape=(2, 5, 6, 4),
        params=frozenset({"kernel", "bias", "gain"}),
    ),
    "ws_conv_transpose": Entry(
        name="WSConvTranspose",
        make=lambda dtype: WSConvTranspose(
            6, (2, 2), strides=(2, 2), transpose_kernel=True, dtype=dtype
        ),
        shape=(2, 5, 6, 4),
        params=frozenset({"kernel", "bias"}),
    ),
    "ws_dense": Entry(
        name="WSDense",
        make=lambda dtype: WSDense(6, dtype=dtype),
        shape=(2, 5, 4),
        params=frozenset({"kernel", "bias"}),
    ),
    "channel_norm": Entry(
        name="ChannelNorm",
        make=lambda dtype: ChannelNorm(num_groups=2, dtype=dtype),
        shape=(2, 5, 6, 4),
        params=frozenset({"scale", "bias"}),
    ),
    "bcn_update_first": Entry(
        name="BatchChannelNorm",
        make=_bcn(order="update_first"),
        shape=(2, 5, 6, 4),
        params=_BCN,
        stats=_STATS,
    ),
    "bcn_normalize_first": Entry(
        name="BatchChannelNorm",
        make=_bcn(order="normalize_first", affine="channel"),
        shape=(2, 5, 6, 4),
        params=_BCN,
        stats=_STATS,
    ),
    "bcn_batch": Entry(
        name="BatchChannelNorm",
        make=_bcn(statistics="batch", rate=lambda count: 1 / (count + 1)),
        shape=(3, 9, 4),
        params=_BCN,
        stats=_STATS,
    ),
    "basic_block": Entry(
        name="BasicBlock",
        make=_residual(BasicBlock),
        shape=(2, 6, 6, 4),
        params=_BCN | {"kernel"},
        stats=_STATS,
    ),
    "bottleneck": Entry(
        name="Bottleneck",
        make=_residual(Bottleneck, groups=2),
        shape=(2, 6, 6, 4),
        params=_BCN | {"kernel"},
        stats=_STATS,
    ),
    "preact_block_dropout": Entry(
        name="PreActBlock",
        make=_residual(
            PreActBlock,
            activated_shortcut=True,
            dropout=functools.partial(nn.Dropout, 0.25, deterministic=False),
        ),
        shape=(2, 6, 6, 4),
        params=_BCN | {"kernel"},
        stats=_STATS,
    ),
    "preact_bottleneck": Entry(
        name="PreActBottleneck",
        make=_residual(PreActBottleneck, base_width=128),
        shape=(2, 6, 6, 4),
        params=_BCN | {"kernel"},
        stats=_STATS,
    ),
    "vgg": Entry(
        name="VGG",
        make=_network(VGG, stage_sizes=(1, 2), stage_features=(4, 8)),
        shape=(2, 8, 8, 3),
        params=_NETWORK_PARAMS,
        stats=_STATS,
        call={"train": True},
    ),
    "cifar_resnet": Entry(
        name="CifarResNet",
        make=_network(CifarResNet, depth=8, width=4),
        shape=(2, 8, 8, 3),
        params=_NETWORK_PARAMS,
        stats=_STATS,
        call={"train": True},
    ),
    "cifar_resnet_preact_dropout": Entry(
        name="CifarResNet",
        make=_network(
            CifarResNet,
            depth=8,
            width=4,
            features=8,
            dropout_rate=0.25,
            block=functools.partial(PreActBlock, activated_shortcut=True),
            norm=_GroupNorm,
        ),
        shape=(2, 8, 8, 3),
        params=frozenset({"kernel", "bias", "scale"}),
        call={"train": True},
    ),
    "resnet": Entry(
        name="ResNet",
        make=_network(
            ResNet,
            stage_sizes=(1,),
            features=8,
            stem_features=4,
            block=functools.partial(Bottleneck, groups=2),
        ),
        shape=(2, 16, 16, 3),
        params=_NETWORK_PARAMS,
        stats=_STATS,
        call={"train": True},
    ),
    "densenet": Entry(
        name="DenseNet",
        make=_network(DenseNet, depth=10, growth=8, norm=_GroupNorm),
        shape=(2, 8, 8, 3),
        params=frozenset({"kernel", "bias", "scale"}),
        call={"train": True},
    ),
}

# The other networks, except DenseNet, are made of these blocks.
PARTS = {n: e for n, e in CATALOGUE.items() if n == "vgg" or not e.returns_logits}
