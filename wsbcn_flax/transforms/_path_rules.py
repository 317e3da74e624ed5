"""Rules that choose kernels in a parameter tree, by their paths."""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

Leaves = Mapping[str, jax.Array]
PathPredicate = Callable[[str, jax.Array], bool]


@dataclasses.dataclass(frozen=True)
class ConvolutionKernel:
    """The exact path and the layout of one convolution kernel that a transform is to take.

    ``normalized_convolutions`` returns a tuple of these. The path is taken literally: characters
    that are special in shell patterns have no special meaning here.

    Attributes:
        path: Path of the kernel in the parameters, such as "block1/conv2/kernel".
        ndim: Number of axes of one layer's kernel. Any further axes in the parameters must lead;
            they count separate layers, as ``nn.scan``, ``nn.vmap`` and ensembles stack them.
        out_axis: Axis of the output channels, in one layer's kernel.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax import WeightStandardization
        >>> from wsbcn_flax.transforms import ConvolutionKernel
        >>> ws = WeightStandardization(where=(ConvolutionKernel("conv[0]/kernel", ndim=4),))
        >>> ws.paths({"conv[0]": {"kernel": jnp.ones((3, 3, 8, 4))}})
        ['conv[0]/kernel']
    """

    path: str
    ndim: int
    out_axis: int = -1


PathRule = None | str | Sequence[str | ConvolutionKernel] | PathPredicate


class Selected(NamedTuple):
    """A kernel that a rule takes, as its path, output axis and number of leading layer axes."""

    path: str
    out_axis: int
    stacked_axes: int


# Names of output layers, such as bbox_pred, cls_score, rpn_cls, final_conv and Head_0.
_HEAD = re.compile(
    r"fc(_?\d+)?|"
    r"(.*_)?(heads?|outs?|outputs?|preds?|predictions?|predictors?|classifiers?|logits?|scores?"
    r"|cls|final)(_?(convs?|layers?))?(_?\d+)?",
    re.IGNORECASE,
)
_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")
_NORM_SCALES = ("scale", "batch_scale")


def select_kernels(
    leaves: Leaves, where: PathRule, *, out_axis: int, stacked_axes: int
) -> list[Selected]:
    """Returns the kernels among ``leaves`` ("a/b/kernel" -> array) that the rule takes, in order.

    Raises:
        TypeError: If the rule is of an unknown type.
        ValueError: If the rule or one of its patterns matches nothing, or a kernel's number of
            layer axes contradicts ``stacked_axes``.
    """
    scales = _scales_by_scope(leaves)
    exact: dict[str, ConvolutionKernel] = {}
    if callable(where):
        matched = {path for path, leaf in leaves.items() if where(path, leaf)}
    elif where is None:
        matched = {
            path
            for path in leaves
            if _is_normalized_convolution(path, leaves, scales, stacked_axes=stacked_axes)
        }
    else:
        entries = (where,) if isinstance(where, str) else tuple(where)
        exact = {entry.path: entry for entry in entries if isinstance(entry, ConvolutionKernel)}
        matched = _match_entries(entries, leaves, stacked_axes=stacked_axes)
    if not matched:
        rule = "the default rule" if where is None else f"where={where!r}"
        raise ValueError(_nothing_matched(rule, leaves, has_norms=bool(scales)))
    selected = []
    for path in (path for path in leaves if path in matched):
        if path in exact:
            selected.append(_locate(exact[path], leaves[path]))
        else:
            _check_stacking(path, leaves, scales, stacked_axes)
            selected.append(Selected(path, out_axis, stacked_axes))
    return selected


def sibling(path: str, name: str) -> str:
    """Returns the path of another parameter of the same module."""
    return f"{_parent(path)}/{name}".removeprefix("/")


def _match_entries(
    entries: Sequence[str | ConvolutionKernel], leaves: Leaves, *, stacked_axes: int
) -> set[str]:
    matches: dict[str, list[str]] = {}
    for entry in entries:
        if isinstance(entry, ConvolutionKernel):
            matches[entry.path] = [entry.path] if entry.path in leaves else []
        elif isinstance(entry, str):
            matches[entry] = _match(entry, leaves, stacked_axes=stacked_axes)
        else:
            raise TypeError(
                "where must be None, a predicate, or made of patterns and ConvolutionKernels, "
                f"received {entry!r}."
            )
    if unmatched := [pattern for pattern, paths in matches.items() if not paths]:
        raise ValueError(_nothing_matched(f"the patterns {unmatched}", leaves))
    return {path for paths in matches.values() for path in paths}


def _match(pattern: str, leaves: Leaves, *, stacked_axes: int) -> list[str]:
    """Lists leaves, of rank 2 or more in a layer, whose or whose module's path matches."""
    return [
        path
        for path, leaf in leaves.items()
        if leaf.ndim - stacked_axes >= 2
        and any(
            name == pattern or fnmatch.fnmatchcase(name, pattern) for name in (path, _parent(path))
        )
    ]


def _is_normalized_convolution(
    path: str, leaves: Leaves, scales: Mapping[str, Sequence[str]], *, stacked_axes: int
) -> bool:
    """Returns whether this looks like a kernel of a convolution that a normalization follows."""
    # A tree of arrays does not show the order of layers. The evidence is a missing bias, which
    # people leave out before a normalization, or a normalization beside the convolution in the same
    # module.
    module, _, name = path.rpartition("/")
    if not scales or name != "kernel" or leaves[path].ndim - stacked_axes < 3:
        return False
    if any(_HEAD.fullmatch(_CAMEL_CASE.sub("_", part)) for part in module.split("/")):
        return False
    return sibling(path, "bias") not in leaves or _parent(module) in scales


def _scales_by_scope(leaves: Leaves) -> dict[str, list[str]]:
    """Groups the scales of normalizations by the module that holds the normalization."""
    scales: dict[str, list[str]] = {}
    for path in leaves:
        if path.rpartition("/")[2] in _NORM_SCALES:
            scales.setdefault(_parent(_parent(path)), []).append(path)
    return scales


def _check_stacking(
    path: str, leaves: Leaves, scales: Mapping[str, Sequence[str]], stacked_axes: int
) -> None:
    """Raises ValueError if the parameters around a kernel contradict ``stacked_axes``."""
    # A bias or scale has one axis in one layer, so its further axes are those that stack layers.
    kernel = leaves[path]
    witnesses = _witnesses(path, leaves, scales)
    for other in witnesses:
        if leaves[other].ndim != 1 + stacked_axes:
            raise ValueError(
                f"{path} {kernel.shape} and the parameters beside it must have the same number of "
                f"axes that stack layers, and {other} {leaves[other].shape} does not fit "
                f"stacked_axes={stacked_axes}, since one layer's bias or scale has one axis. Use "
                "where=normalized_convolutions(model, inputs), which knows each kernel's layout; "
                f"or pass stacked_axes={leaves[other].ndim - 1}, with where= patterns for the "
                "layers that this fits, and a second transform for the others."
            )
    ndim = kernel.ndim - stacked_axes
    if ndim > 5 or (ndim == 5 and not witnesses):
        raise ValueError(
            "It must be clear how many leading axes of a kernel stack layers, and "
            f"{path} {kernel.shape} may be a stack of layers with stacked_axes={stacked_axes}. Use "
            "where=normalized_convolutions(model, inputs). If stacked_axes is right, use "
            f"where=(ConvolutionKernel({path!r}, ndim={ndim}),). If not, pass the number of "
            "leading axes that stack layers as stacked_axes=."
        )


def _witnesses(path: str, leaves: Leaves, scales: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Returns the kernel's bias, or else the scales in the nearest module around it."""
    if (bias := sibling(path, "bias")) in leaves:
        return [bias]
    scope = _parent(path)
    while scope:
        scope = _parent(scope)
        if scope in scales:
            return scales[scope]
    return []


def _locate(kernel: ConvolutionKernel, leaf: jax.Array) -> Selected:
    stacked_axes = leaf.ndim - kernel.ndim
    if stacked_axes < 0:
        raise ValueError(
            f"{kernel.path} must have at least the {kernel.ndim} axes of one layer's kernel, "
            f"received shape {leaf.shape}. Make the rule from the model of these parameters."
        )
    return Selected(kernel.path, kernel.out_axis, stacked_axes)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _nothing_matched(rule: str, leaves: Leaves, *, has_norms: bool = True) -> str:
    kernels = [path for path, leaf in leaves.items() if leaf.ndim >= 2]
    shown = ", ".join(kernels[:8]) + (", ..." if len(kernels) > 8 else "")
    reason = "" if has_norms else "No normalization has a parameter named scale here. "
    if any(path.startswith("params/") for path in leaves):
        reason += 'These are variables: pass variables["params"]. '
    return (
        f"A path rule must match at least one kernel, and {rule} matched none of "
        f"[{shown or 'no kernels at all'}]. {reason}The default takes convolution kernels (rank 3 "
        "or more, named kernel, outside heads) that a normalization follows. To choose exactly, "
        "pass where=normalized_convolutions(model, inputs), where=lambda path, array: ..., or "
        "patterns such as where='encoder/*/kernel'."
    )
