"""Weight Standardization as a parameter transform: params -> params."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import traverse_util

from wsbcn_flax.ops import StandardizationRule, standardize
from wsbcn_flax.ops._rules import resolve_rule
from wsbcn_flax.transforms._path_rules import PathRule, select_paths

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization:
    """Standardizes the kernels of a plain model's parameters, by a rule on their paths.

    A pure function of the parameters: apply the model to its result and it computes what the same
    model built from ``WSConv`` computes. Differentiate through it, or, for many micro-batches,
    apply it once a step and pull the accumulated gradient back once (``make_train_step`` does). The
    result is also the folded model for inference: plain layers, nothing left to standardize.

    Where a kernel has a sibling named ``gain`` [out], as ``WSConv`` makes for presets with a
    learnable gain, the kernel is multiplied by it and the gain is dropped.

    Attributes:
        preset: the convention, as in ``standardize``.
        where: None takes every convolution kernel (rank 3 or more, named ``kernel``) that a
            normalization follows and never a head: a kernel without a bias, or with a normalization
            beside it in its module, and no module on the path named head, classifier, logits,
            predictor or fc. Otherwise a predicate ``(path, array) -> bool`` on paths such as
            "block1/conv2/kernel", or shell patterns on the path of the kernel or of its module.
        out_axis: the axis of output channels of the kernels taken. For
            ``nn.ConvTranspose(transpose_kernel=True)`` use a second transform with -2.

    Raises:
        TypeError, ValueError: for an unknown preset; when called, for a rule that matches nothing
            or a kernel that cannot be standardized.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax import WeightStandardization
        >>> model = nn.Sequential([nn.Conv(8, (3, 3), use_bias=False), nn.GroupNorm(4), nn.relu])
        >>> x = jnp.ones((1, 4, 4, 3))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> ws = WeightStandardization()
        >>> ws.paths(params)
        ['layers_0/kernel']
        >>> model.apply({"params": ws(params)}, x).shape
        (1, 4, 4, 8)
    """

    preset: str | StandardizationRule = "bcn"
    where: PathRule = None
    out_axis: int = -1

    def __post_init__(self):
        resolve_rule(self.preset)
        if isinstance(self.where, list):
            # Hashable, as what jax.jit compiles must be.
            object.__setattr__(self, "where", tuple(self.where))

    def __call__(self, params: Params) -> dict[str, Any]:
        """The parameters, with the kernels the rule takes standardized."""
        leaves = _flatten(params)
        for path in select_paths(leaves, self.where):
            gain = leaves.pop(_gain_path(path), None)
            try:
                leaves[path] = standardize(
                    leaves[path], preset=self.preset, out_axis=self.out_axis, gain=gain
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from error
        return traverse_util.unflatten_dict(leaves, sep="/")

    def paths(self, params: Params) -> list[str]:
        """The paths of the kernels the rule takes, to look at before training."""
        return select_paths(_flatten(params), self.where)

    def with_gains(self, params: Params) -> dict[str, Any]:
        """The parameters of a plain model with the gains its preset learns, initialized to one.

        Without a learnable gain in the preset, the parameters as they are.
        """
        leaves = _flatten(params)
        if resolve_rule(self.preset).learnable_gain:
            for path in select_paths(leaves, self.where):
                kernel = leaves[path]
                leaves[_gain_path(path)] = jnp.ones(kernel.shape[self.out_axis], kernel.dtype)
        return traverse_util.unflatten_dict(leaves, sep="/")


def _flatten(params: Params) -> dict[str, jax.Array]:
    return cast(dict[str, jax.Array], traverse_util.flatten_dict(params, sep="/"))


def _gain_path(kernel_path: str) -> str:
    return f"{kernel_path.rpartition('/')[0]}/gain"
