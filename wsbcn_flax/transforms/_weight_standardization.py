"""Weight Standardization as a parameter transform: params -> params."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from wsbcn_flax.ops import StandardizationRule, standardize
from wsbcn_flax.ops._rules import resolve_rule
from wsbcn_flax.transforms._path_rules import PathRule, Selected, select_kernels, sibling

Params = TypeVar("Params", bound=Mapping[str, Any])

_REMOVED = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization:
    """Weight Standardization of a plain model's parameters, for kernels chosen by a rule.

    A pure function of the parameters: apply the model to its result and it computes what the same
    model built from ``WSConv`` computes. Differentiate through it, or, for many micro-batches,
    apply it once a step and pull the accumulated gradient back once (``make_train_step`` does). The
    result is also the folded model for inference: plain layers, nothing left to standardize.

    With a model at hand, ``where=normalized_convolutions(model, inputs)`` takes exactly the
    convolutions that a normalization follows. Without one, the default rule guesses from the
    names in the parameter tree: it takes the kernels (rank 3 or more, named ``kernel``) that have
    no bias, or a normalization beside them in their module. It never takes a kernel in a
    module named as an output is (head, fc, out, output, pred, classifier, logits, score, cls,
    final and the like; also ``bbox_pred``, ``mask_out``, ``final_conv``, ``Head_0``), and nothing
    from a tree without normalizations.

    Where a kernel has a sibling named ``gain`` [out], as ``WSConv`` makes for presets with a
    learnable gain, the kernel is multiplied by it and the gain is dropped.

    Dictionaries come back as the kind they were (``FrozenDict`` and ``nnx.State`` too), and boxes
    such as ``nn.Partitioned`` and ``nnx.Param`` with what they know. For an NNX model these are the
    parameters that ``nnx.split(model, nnx.Param, ...)`` returns; numbers in lists are parts of a
    path, such as "layers/0/kernel".

    Attributes:
        preset: Convention, as in ``standardize``.
        where: Rule that chooses kernels. ``None`` is the default rule above. Otherwise the result
            of ``normalized_convolutions``, a predicate ``(path, array) -> bool`` on paths such as
            "block1/conv2/kernel", or shell patterns on the path of the kernel or of its module.
        out_axis: Axis of output channels, in one layer's kernel. For
            ``nn.ConvTranspose(transpose_kernel=True)`` use a second transform with -2. Kernels
            from ``normalized_convolutions`` carry their own.
        stacked_axes: Number of leading axes that count separate layers, as ``nn.scan`` and
            ``nn.vmap`` stack them: each layer is standardized by itself, and gains are
            [layers, out]. Kernels from ``normalized_convolutions`` carry their own.

    Raises:
        TypeError, ValueError: For an unknown preset or a negative ``stacked_axes``; when called,
            for a rule that matches nothing, a kernel that cannot be standardized, or a bias or
            normalization beside a kernel that contradicts ``stacked_axes``.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax import WeightStandardization
        >>> from wsbcn_flax.transforms import normalized_convolutions
        >>> model = nn.Sequential([nn.Conv(8, (3, 3)), nn.GroupNorm(4), nn.Conv(2, (1, 1))])
        >>> x = jnp.ones((1, 4, 4, 3))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> ws = WeightStandardization(where=normalized_convolutions(model, x))
        >>> ws.paths(params)
        ['layers_0/kernel']
        >>> model.apply({"params": ws(params)}, x).shape
        (1, 4, 4, 2)

        Five layers in one array, as ``nn.scan`` stores them:

        >>> kernel, scale = jnp.ones((5, 3, 3, 8, 8)), jnp.ones((5, 8))
        >>> params = {"conv": {"kernel": kernel}, "norm": {"scale": scale}}
        >>> WeightStandardization(stacked_axes=1)(params)["conv"]["kernel"].shape
        (5, 3, 3, 8, 8)

        A plain NNX model, called with standardized kernels:

        >>> from flax import nnx
        >>> conv = lambda rngs: nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(conv(rngs), nnx.GroupNorm(8, 4, rngs=rngs))
        >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        >>> nnx.merge(graphdef, WeightStandardization()(params), rest)(x).shape
        (1, 4, 4, 8)
    """

    preset: str | StandardizationRule = "bcn"
    where: PathRule = None
    out_axis: int = -1
    stacked_axes: int = 0

    def __post_init__(self):
        resolve_rule(self.preset)
        if self.stacked_axes < 0:
            raise ValueError(
                "stacked_axes must be the number of leading axes that count layers, 0 for none, "
                f"received {self.stacked_axes}."
            )
        if isinstance(self.where, list):
            # Hashable, as what jax.jit compiles must be.
            object.__setattr__(self, "where", tuple(self.where))

    def __call__(self, params: Params) -> Params:
        """Returns the parameters, with the kernels the rule takes standardized."""
        leaves = _flatten(params)
        arrays = _arrays(leaves)
        edits: dict[str, Any] = {}
        for kernel in self._select(arrays):
            gain_path = sibling(kernel.path, "gain")
            gain = arrays.get(gain_path)
            if gain is not None:
                edits[gain_path] = _REMOVED
            function = functools.partial(self._standardize, kernel, gain)
            try:
                # A box is a tree with one leaf, its array.
                edits[kernel.path] = jax.tree.map(function, leaves[kernel.path])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{kernel.path}: {error}") from error
        return _edit(params, edits)

    def paths(self, params: Mapping[str, Any]) -> list[str]:
        """Returns the paths of the kernels the rule takes, to look at before training."""
        return [kernel.path for kernel in self._select(_arrays(_flatten(params)))]

    def with_gains(self, params: Params) -> Params:
        """Returns a plain model's parameters with the gains its preset learns, all of them one.

        Without a learnable gain in the preset, returns the parameters as they are.
        """
        edits: dict[str, Any] = {}
        if resolve_rule(self.preset).learnable_gain:
            leaves = _flatten(params)
            arrays = _arrays(leaves)
            for kernel in self._select(arrays):
                array, box = arrays[kernel.path], leaves[kernel.path]
                layers = array.shape[: kernel.stacked_axes]
                features = array.shape[kernel.stacked_axes :][kernel.out_axis]
                gain = jnp.ones((*layers, features), array.dtype)
                is_variable = isinstance(box, nnx.Variable)
                edits[sibling(kernel.path, "gain")] = nnx.Param(gain) if is_variable else gain
        return _edit(params, edits)

    def _select(self, arrays: Mapping[str, jax.Array]) -> list[Selected]:
        return select_kernels(
            arrays, self.where, out_axis=self.out_axis, stacked_axes=self.stacked_axes
        )

    def _standardize(self, kernel: Selected, gain: jax.Array | None, array: jax.Array) -> jax.Array:
        def one_layer(array: jax.Array, gain: jax.Array | None) -> jax.Array:
            return standardize(array, preset=self.preset, out_axis=kernel.out_axis, gain=gain)

        for _ in range(kernel.stacked_axes):
            one_layer = jax.vmap(one_layer)
        return one_layer(array, gain)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by path, such as "block1/conv2/kernel"."""
    if not isinstance(params, Mapping):
        raise TypeError(
            "Parameters must be nested dictionaries of arrays, as model.init(...)['params'] is, or "
            f"an nnx.State, as nnx.state(model, nnx.Param) is, received {type(params).__name__}."
        )
    leaves: dict[str, Any] = {}
    for name, node in params.items():
        if isinstance(node, Mapping):
            leaves |= _flatten(node, f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = node
    return leaves


def _arrays(leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays among the leaves, those in boxes included."""
    contents = {path: jax.tree.leaves(leaf) for path, leaf in leaves.items()}
    return {path: c[0] for path, c in contents.items() if len(c) == 1 and hasattr(c[0], "ndim")}


def _edit(params: Params, edits: Mapping[str, Any]) -> Params:
    """The parameters with leaves replaced, added or removed; dictionaries keep their kind."""
    by_module: dict[str, dict[str, Any]] = {}
    for path, leaf in edits.items():
        module, _, name = path.rpartition("/")
        by_module.setdefault(module, {})[name] = leaf

    def visit(node: Any, path: str) -> Any:
        if not isinstance(node, Mapping):
            return node
        # A state's own dictionaries are plain; its items are views of them.
        items = (node.raw_mapping if isinstance(node, nnx.State) else node).items()
        children = {name: visit(child, f"{path}/{name}") for name, child in items}
        children |= by_module.get(path.removeprefix("/"), {})
        children = {name: child for name, child in children.items() if child is not _REMOVED}
        kind: Any = next((k for k in (FrozenDict, nnx.State) if isinstance(node, k)), dict)
        return kind(children)

    return visit(params, "")
