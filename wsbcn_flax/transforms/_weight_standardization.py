"""Weight Standardization as a parameter transform: params -> params."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from wsbcn_flax.ops import StandardizationRule, standardize
from wsbcn_flax.ops._rules import resolve_rule
from wsbcn_flax.ops._weight_standardization import restoring_affine
from wsbcn_flax.transforms._path_rules import PathRule, Selected, select_kernels, sibling

Params = TypeVar("Params", bound=Mapping[str, Any])

_REMOVED = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization:
    """Weight Standardization of a plain model's parameters, for kernels chosen by a rule.

    It is a pure function of the parameters. With its result the plain model computes the same as
    the model built from ``WSConv``. Differentiate through it. For many micro-batches, apply it once
    a step and pull the accumulated gradient back once, as ``make_train_step`` does. The result is
    also the folded model for inference: plain layers, nothing left to standardize.

    If you have the model, ``where=normalized_convolutions(model, inputs)`` takes exactly the
    convolutions that a normalization follows. Otherwise the default rule guesses from the names in
    the parameter tree. It takes kernels (rank 3 or more, named ``kernel``) that have no bias, or
    have a normalization beside their layer in the same module. It never takes a kernel in a module
    named as an output (head, fc, out, output, pred, classifier, logits, score, cls, final and the
    like; also ``bbox_pred``, ``mask_out``, ``final_conv``, ``Head_0``). It takes nothing from a
    tree without normalizations.

    A kernel may have a sibling named ``gain`` [out], which ``WSConv`` makes for presets with a
    learnable gain. Then the kernel is multiplied by the gain, and the gain is dropped. The two
    constants of the preset "aws" are applied and dropped too; ``start_from_plain`` sets them for a
    model trained without WS.

    Dictionaries keep their kind (``FrozenDict`` and ``nnx.State`` too), and boxes such as
    ``nn.Partitioned`` and ``nnx.Param`` keep their metadata. For an NNX model, pass the parameters
    that ``nnx.split(model, nnx.Param, ...)`` returns. Numbers in lists are parts of a path, such as
    "layers/0/kernel".

    Attributes:
        preset: Convention, as in ``standardize``.
        where: Rule that chooses kernels. ``None`` is the default rule above. Otherwise it is the
            result of ``normalized_convolutions``, a predicate ``(path, array) -> bool``, or shell
            patterns on the path of the kernel or of its module. A path is, for
            example, "block1/conv2/kernel".
        out_axis: Axis of output channels, in one layer's kernel. For
            ``nn.ConvTranspose(transpose_kernel=True)`` use a second transform with -2. Kernels
            from ``normalized_convolutions`` carry their own output axis.
        stacked_axes: Number of leading axes that count separate layers, as ``nn.scan`` and
            ``nn.vmap`` stack them. Each layer is standardized by itself, and gains are
            [layers, out]. Kernels from ``normalized_convolutions`` carry their own number.
        dtype: Dtype of the standardized kernels; defaults to the dtype of the parameters.

    Raises:
        TypeError, ValueError: For an unknown preset or a negative ``stacked_axes``. When called,
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
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        resolve_rule(self.preset)
        if self.stacked_axes < 0:
            raise ValueError(
                "stacked_axes must be the number of leading axes that count layers, 0 for none, "
                f"received {self.stacked_axes}."
            )
        if isinstance(self.where, list):
            # A tuple is hashable, as jax.jit requires of a function that it compiles.
            object.__setattr__(self, "where", tuple(self.where))

    def __call__(self, params: Params) -> Params:
        """Returns the parameters, with the kernels that the rule takes standardized."""
        leaves = _flatten(params)
        arrays = _arrays(leaves)
        edits: dict[str, Any] = {}
        for kernel in self._select(arrays):
            affine: dict[str, jax.Array | None] = {"gain": None, "shift": None}
            for argument, name in self._siblings().items():
                if (path := sibling(kernel.path, name)) in arrays:
                    affine[argument] = arrays[path]
                    edits[path] = _REMOVED
            function = functools.partial(self._standardize, kernel, **affine)
            try:
                # A box is a tree with one leaf, its array.
                edits[kernel.path] = jax.tree.map(function, leaves[kernel.path])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{kernel.path}: {error}") from error
        return _edit(params, edits)

    def paths(self, params: Mapping[str, Any]) -> list[str]:
        """Returns the paths of the kernels that the rule takes, to check before training."""
        return [kernel.path for kernel in self._select(_arrays(_flatten(params)))]

    def with_gains(self, params: Params) -> Params:
        """Returns a plain model's parameters with the gains that the preset learns, all one.

        For the preset "aws" it adds the constants, gains of one and shifts of zero. For a preset
        with neither gains nor constants it returns the parameters as they are.
        """
        added = resolve_rule(self.preset).channel_parameters

        def values(kernel: Selected, array: jax.Array) -> dict[str, jax.Array]:
            layers = array.shape[: kernel.stacked_axes]
            features = array.shape[kernel.stacked_axes :][kernel.out_axis]
            return {
                name: jnp.full((*layers, features), start, array.dtype)
                for name, start in added.values()
            }

        return self._with_siblings(params, values) if added else params

    def start_from_plain(self, params: Params) -> Params:
        """Returns parameters trained without WS, plus constants with which WS changes nothing yet.

        This is for the preset "aws". Its constants become each kernel's own standard deviation and
        mean. So the standardized kernels are the raw ones, to rounding, and the model computes the
        same as before. From then on WS keeps each kernel's mean and scale during training.

        Args:
            params: Raw parameters of a plain model, or of one with the preset "aws".

        Raises:
            ValueError: For a preset without constants.

        References:
            mmcv's ``ConvAWS2d``; Qiao et al., DetectoRS, https://arxiv.org/abs/2006.02334

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from wsbcn_flax import WeightStandardization
            >>> kernel = 3 + jax.random.normal(jax.random.key(0), (3, 3, 8, 4))
            >>> plain = {"conv": {"kernel": kernel}, "norm": {"scale": jnp.ones(4)}}
            >>> ws = WeightStandardization(preset="aws")
            >>> params = ws.start_from_plain(plain)
            >>> bool(jnp.abs(ws(params)["conv"]["kernel"] - kernel).max() < 1e-5)
            True
        """
        rule = resolve_rule(self.preset)
        if not rule.constants:
            raise ValueError(
                "Only a preset with constants can start as a plain model, received "
                f'{self.preset!r}. Use WeightStandardization(preset="aws").'
            )

        def values(kernel: Selected, array: jax.Array) -> dict[str, jax.Array]:
            def one_layer(array: jax.Array) -> tuple[jax.Array, jax.Array]:
                return restoring_affine(array, rule, kernel.out_axis)

            for _ in range(kernel.stacked_axes):
                one_layer = jax.vmap(one_layer)
            return dict(zip(self._siblings().values(), one_layer(array), strict=True))

        return self._with_siblings(params, values)

    def _siblings(self) -> dict[str, str]:
        """Maps arguments of ``standardize`` to the names of the parameters beside a kernel."""
        added = resolve_rule(self.preset).channel_parameters
        return {"gain": "gain", **{argument: name for argument, (name, _) in added.items()}}

    def _with_siblings(
        self, params: Params, values: Callable[[Selected, jax.Array], dict[str, jax.Array]]
    ) -> Params:
        """Adds parameters beside each kernel that the rule takes."""
        leaves = _flatten(params)
        arrays = _arrays(leaves)
        edits: dict[str, Any] = {}
        for kernel in self._select(arrays):
            is_variable = isinstance(leaves[kernel.path], nnx.Variable)
            for name, value in values(kernel, arrays[kernel.path]).items():
                edits[sibling(kernel.path, name)] = nnx.Param(value) if is_variable else value
        return _edit(params, edits)

    def _select(self, arrays: Mapping[str, jax.Array]) -> list[Selected]:
        return select_kernels(
            arrays, self.where, out_axis=self.out_axis, stacked_axes=self.stacked_axes
        )

    def _standardize(
        self,
        kernel: Selected,
        array: jax.Array,
        *,
        gain: jax.Array | None,
        shift: jax.Array | None,
    ) -> jax.Array:
        def one_layer(array: jax.Array, gain: Any, shift: Any) -> jax.Array:
            return standardize(
                array,
                preset=self.preset,
                out_axis=kernel.out_axis,
                gain=gain,
                shift=shift,
                dtype=self.dtype,
            )

        for _ in range(kernel.stacked_axes):
            one_layer = jax.vmap(one_layer)
        return one_layer(array, gain, shift)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dictionaries by path, such as "block1/conv2/kernel"."""
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
    """Returns the arrays among the leaves, including those in boxes."""
    contents = {path: jax.tree.leaves(leaf) for path, leaf in leaves.items()}
    return {path: c[0] for path, c in contents.items() if len(c) == 1 and hasattr(c[0], "ndim")}


def _edit(params: Params, edits: Mapping[str, Any]) -> Params:
    """Replaces, adds or removes leaves of the parameters; dictionaries keep their kind."""
    by_module: dict[str, dict[str, Any]] = {}
    for path, leaf in edits.items():
        module, _, name = path.rpartition("/")
        by_module.setdefault(module, {})[name] = leaf

    def visit(node: Any, path: str) -> Any:
        if not isinstance(node, Mapping):
            return node
        # An nnx.State holds plain dictionaries; its items are views of them.
        items = (node.raw_mapping if isinstance(node, nnx.State) else node).items()
        children = {name: visit(child, f"{path}/{name}") for name, child in items}
        children |= by_module.get(path.removeprefix("/"), {})
        children = {name: child for name, child in children.items() if child is not _REMOVED}
        kind: Any = next((k for k in (FrozenDict, nnx.State) if isinstance(node, k)), dict)
        return kind(children)

    return visit(params, "")
