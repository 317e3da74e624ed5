"""Every public layer and model, with what it takes to run it, for the tests all must pass."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from oracles import normal

from wsbcn_flax import BatchChannelNorm, WSConv, WSConvTranspose, WSDense
from wsbcn_flax.models import BasicBlock, CifarResNet, PreActBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One way to build and call one public module.

    Attributes:
        name: of the module in its package's ``__all__``.
        make: builds the module, computing in the dtype given.
        shape: of the input.
        params: the names of its parameters.
        stats: the names of its running statistics.
        call: keywords of a call in training.
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
        """Variables with every leaf, zero scales included, moved from where it starts."""
        init = functools.partial(self.make(None).init, **self.call)
        variables = dict(jax.jit(init)(jax.random.key(0), self.example()))
        leaves, structure = jax.tree.flatten(variables["params"])
        moved = [leaf + 0.05 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
        variables["params"] = jax.tree.unflatten(structure, moved)
        return variables

    def apply(self, variables, x, *, dtype=None):
        """Trains on one batch: the output, and the variables after it."""
        y, updates = self.make(dtype).apply(variables, x, **self.call, mutable=["batch_stats"])
        return y, {**variables, **updates}


def _bcn(**options):
    return lambda dtype: BatchChannelNorm(
        num_groups=2, use_running_average=False, dtype=dtype, **options
    )


def _norm(dtype):
    return functools.partial(BatchChannelNorm, num_groups=2, use_running_average=False, dtype=dtype)


def _residual(block):
    return lambda dtype: block(
        8, conv=functools.partial(WSConv, dtype=dtype), norm=_norm(dtype), strides=2
    )


def _resnet(block, norm):
    return lambda dtype: CifarResNet(
        depth=8, num_classes=3, width=4, block=block, conv=WSConv, norm=norm, dtype=dtype
    )


_BCN = frozenset({"batch_scale", "batch_bias", "channel_scale", "channel_bias"})
_STATS = frozenset({"mean", "var", "count"})
_RESNET_PARAMS = _BCN | {"kernel", "bias"}

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
    "bcn_update_first": Entry(
        name="BatchChannelNorm", make=_bcn(), shape=(2, 5, 6, 4), params=_BCN, stats=_STATS
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
    "preact_block": Entry(
        name="PreActBlock",
        make=_residual(PreActBlock),
        shape=(2, 6, 6, 4),
        params=_BCN | {"kernel"},
        stats=_STATS,
    ),
    "cifar_resnet": Entry(
        name="CifarResNet",
        make=_resnet(BasicBlock, functools.partial(BatchChannelNorm, num_groups=2)),
        shape=(2, 8, 8, 3),
        params=_RESNET_PARAMS,
        stats=_STATS,
        call={"train": True},
    ),
    "cifar_resnet_preact": Entry(
        name="CifarResNet",
        make=_resnet(PreActBlock, functools.partial(nn.GroupNorm, num_groups=2)),
        shape=(2, 8, 8, 3),
        params=frozenset({"kernel", "bias", "scale"}),
        call={"train": True},
    ),
}
