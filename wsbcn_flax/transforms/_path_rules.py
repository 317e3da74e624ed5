"""Which leaves of a parameter tree a transform applies to."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

import jax

PathPredicate = Callable[[str, jax.Array], bool]
PathRule = None | str | Sequence[str] | PathPredicate

_HEAD = re.compile(r"(head|fc|(.*_)?(classifier|logits|predictor))(_?\d+)?", re.IGNORECASE)
_NORM_SCALES = ("scale", "batch_scale")


def select_paths(leaves: Mapping[str, jax.Array], where: PathRule) -> list[str]:
    """The paths among ``leaves`` ("a/b/kernel" -> array) that the rule takes, in their order.

    Raises:
        ValueError: if the rule, or one of its patterns, matches nothing.
    """
    if callable(where):
        selected = {path for path, leaf in leaves.items() if where(path, leaf)}
    elif where is None:
        selected = {path for path in leaves if _is_normalized_convolution(path, leaves)}
    else:
        patterns = (where,) if isinstance(where, str) else tuple(where)
        matches = {pattern: _match(pattern, leaves) for pattern in patterns}
        unmatched = [pattern for pattern, paths in matches.items() if not paths]
        if unmatched:
            raise ValueError(_nothing_matched(f"the patterns {unmatched}", leaves))
        selected = {path for paths in matches.values() for path in paths}
    if not selected:
        rule = "the default rule" if where is None else f"where={where!r}"
        raise ValueError(_nothing_matched(rule, leaves))
    return [path for path in leaves if path in selected]


def _match(pattern: str, leaves: Mapping[str, jax.Array]) -> list[str]:
    """Leaves of rank 2 or more whose path, or whose module's path, the pattern matches."""
    return [
        path
        for path, leaf in leaves.items()
        if leaf.ndim >= 2
        and (fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(_parent(path), pattern))
    ]


def _is_normalized_convolution(path: str, leaves: Mapping[str, jax.Array]) -> bool:
    """A convolution's kernel, outside any head, that a normalization follows.

    A tree of arrays does not say what follows what. Evidence is a missing bias, which people leave
    out before a normalization, or a normalization beside the convolution in the same module.
    """
    module, _, name = path.rpartition("/")
    if name != "kernel" or leaves[path].ndim < 3:
        return False
    if any(_HEAD.fullmatch(part) for part in module.split("/")):
        return False
    if f"{module}/bias" not in leaves:
        return True
    scope = _parent(module)
    return any(
        other.rpartition("/")[2] in _NORM_SCALES and _parent(_parent(other)) == scope
        for other in leaves
    )


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _nothing_matched(rule: str, leaves: Mapping[str, jax.Array]) -> str:
    kernels = [path for path, leaf in leaves.items() if leaf.ndim >= 2]
    shown = ", ".join(kernels[:8]) + (", ..." if len(kernels) > 8 else "")
    return (
        f"A path rule must match at least one kernel, and {rule} matched none of "
        f"[{shown or 'no kernels at all'}]. The default takes convolution kernels (rank 3 or more, "
        "named kernel, outside heads) that a normalization follows; to choose others pass "
        "where=lambda path, array: ... or patterns such as where='encoder/*/kernel'."
    )
