"""Conversion of PyTorch checkpoints of residual networks to variables here, and back."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from wsbcn_flax.ops._rules import resolve_rule
from wsbcn_flax.transforms._checkpoint_specs import checkpoint_names, checkpoint_spec

Convert = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The layout of one kind of array in PyTorch and in Flax; its functions are inverses."""

    to_torch: Convert
    to_flax: Convert


_SAME = _Layout(lambda a: a, lambda a: a)
_CONV = _Layout(lambda a: a.transpose(3, 2, 0, 1), lambda a: a.transpose(2, 3, 1, 0))  # HWIO, OIHW
_DENSE = _Layout(np.transpose, np.transpose)
_GROUP = _Layout(lambda a: a.reshape(1, -1, 1), lambda a: a.reshape(-1))
_COUNT = _Layout(lambda a: a.astype(np.int64), lambda a: a.astype(np.float32))

# Prefixes that DataParallel, torch.compile and a module that holds the model add to its keys.
_WRAPPERS = ("module.", "_orig_mod.", "model.")

# Patterns of Flax module names, and the PyTorch names.
_MODULES = (
    (r"stem_conv", "conv1"),
    (r"stem_norm", "bn1"),
    (r"head", "fc"),
    (r"conv(\d)", r"conv\1"),
    (r"norm(\d)", r"bn\1"),
    (r"shortcut_conv", "downsample.0"),
    (r"shortcut_norm", "downsample.1"),
)
# Flax name and rank of a leaf, and its PyTorch name and layout. The running variance is PyTorch's
# unbiased one. Evaluation uses it as it is, so the same number is the exact conversion.
_LEAVES = {
    ("kernel", 4): ("weight", _CONV),
    ("kernel", 2): ("weight", _DENSE),
    ("bias", 1): ("bias", _SAME),
    ("scale", 1): ("weight", _SAME),
    ("mean", 1): ("running_mean", _SAME),
    ("var", 1): ("running_var", _SAME),
    ("batch_scale", 1): ("pbn.weight", _SAME),
    ("batch_bias", 1): ("pbn.bias", _SAME),
    ("channel_scale", 1): ("weight", _GROUP),
    ("channel_bias", 1): ("bias", _GROUP),
    ("count", 0): ("num_batches_tracked", _COUNT),
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One array, as its path and shape here, its PyTorch key, and its layout."""

    path: tuple[str, ...]
    array: jax.ShapeDtypeStruct
    key: str
    layout: _Layout

    @property
    def expected(self) -> np.ndarray:
        """Returns an array of the shape and dtype that it has in PyTorch."""
        zero = np.zeros((), self.array.dtype)
        return self.layout.to_torch(np.broadcast_to(zero, self.array.shape))


def import_checkpoint(
    state_dict: Mapping[str, Any], name: str, *, preset: str | None = None
) -> dict[str, Any]:
    """Converts a PyTorch state dict to the variables of the model of that architecture.

    Kernels go from OIHW to HWIO, and the head is transposed. Batch-channel normalization's affine
    map stays one number per group. Apart from rounding to float32, ``export_checkpoint`` gives
    every number back as it was. Kernels stay raw: apply
    ``WeightStandardization(preset=checkpoint_spec(name).preset)``, or fold them once and for all
    with ``fold_weight_standardization``. Running variances are PyTorch's, which are unbiased;
    evaluation uses them as they are, in PyTorch and here. The count of batches becomes float32,
    exact up to 2^24. Plain batch normalization drops it, since Flax's has none.

    A shape may have more or fewer axes of length one than PyTorch's, if its other axes all have
    different lengths. Examples are (1, 1, 1, C) and (1, C, 1, 1) for the scale of a normalization.
    Floating-point numbers of any width become float32: wider ones are rounded.

    Args:
        state_dict: NumPy arrays by key, or the dict in a file of the authors', which has the arrays
            under ``state_dict`` among other things. The prefixes ``module.``, ``_orig_mod.`` and
            ``model.`` are dropped, in any order, where all keys have them.
        name: Architecture, one of ``checkpoint_names()``.
        preset: Convention of Weight Standardization in the model that will use the variables, for a
            warning where it is not the checkpoint's; None for no warning.

    Returns:
        ``{"params": ..., "batch_stats": ...}`` of NumPy arrays; batch_stats is empty for GN.

    Raises:
        ValueError: For an unknown name. For keys that are missing or extra, or whose arrays have a
            wrong shape or a dtype that does not convert; the message lists all four. For values
            that are not finite, beyond float32's range, or negative variances; the message lists
            the keys of all three.

    Warns:
        UserWarning: For a preset with which the kernels compute another function than in training.
            With "aws" a checkpoint trained without WS starts with the same function.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.transforms import checkpoint_spec, export_checkpoint, import_checkpoint
        >>> model = checkpoint_spec("resnet18").make_model()
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False)
        >>> state_dict = export_checkpoint(variables, "resnet18")
        >>> state_dict["conv1.weight"].shape
        (64, 3, 7, 7)
        >>> import_checkpoint(state_dict, "resnet18")["params"]["stem_conv"]["kernel"].shape
        (7, 7, 3, 64)
    """
    _warn_of_another_function(name, preset)
    arrays, entries = _strip_prefix(state_dict), _entries(name)
    if problems := _problems(arrays, entries):
        first = f"The keys must be those of {name}, and are not:"
        raise ValueError("\n".join([first, *problems, _hint(arrays)]))
    with np.errstate(over="ignore"):  # Reported below, with the keys.
        leaves = {entry.path: _converted(arrays[entry.key], entry) for entry in entries}
    if problems := _bad_values(arrays, entries, leaves):
        first = f"The values of {name} must be finite and its variances not negative; they are not:"
        last = "The file is damaged, or its training diverged. Use another or an earlier file."
        raise ValueError("\n".join([first, *problems, last]))
    return {"batch_stats": {}, **traverse_util.unflatten_dict(leaves)}


def export_checkpoint(variables: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """Converts variables to the PyTorch state dict of that architecture, bit for bit.

    It is the inverse of ``import_checkpoint``. ``num_batches_tracked`` of plain batch normalization
    is zero, since Flax does not count batches.

    Args:
        variables: Variables ``{"params": ..., "batch_stats": ...}`` of the model.
        name: Architecture, one of ``checkpoint_names()``.

    Raises:
        ValueError: For an unknown name, or variables that are not that model's.
    """
    leaves: dict[Any, Any] = traverse_util.flatten_dict(dict(variables))
    entries = _entries(name)
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
    if shapes != {entry.path: entry.array.shape for entry in entries}:
        wrong = {entry.path: entry.array.shape for entry in entries}.items() ^ shapes.items()
        listed = ", ".join(sorted({"/".join(path) for path, _ in wrong})[:5])
        raise ValueError(
            f"variables must be those of {name}, received others at {listed}. "
            f"checkpoint_spec({name!r}).make_model() makes the model."
        )
    arrays = {
        entry.key: np.array(entry.layout.to_torch(np.asarray(leaves[entry.path])), order="C")
        for entry in entries
    }
    return {**arrays, **{key: np.zeros((), np.int64) for key in _untracked(entries)}}


def guess_checkpoint_name(state_dict: Mapping[str, Any]) -> str:
    """Returns the architecture whose keys and shapes are those of a state dict.

    Args:
        state_dict: State dict, as in ``import_checkpoint``.

    Raises:
        ValueError: If there is no such architecture.
    """
    arrays = _strip_prefix(state_dict)
    for name in checkpoint_names():
        if not _problems(arrays, _entries(name)):
            return name
    raise ValueError(
        f"A checkpoint's keys and shapes must be those of one of {', '.join(checkpoint_names())}; "
        f"these {len(arrays)} are not: {', '.join(list(arrays)[:5])}, ..."
    )


def _warn_of_another_function(name: str, preset: str | None) -> None:
    """Warns if ``preset`` makes a model compute another function with a checkpoint's kernels."""
    trained = checkpoint_spec(name).preset
    if preset is None or resolve_rule(preset) == (trained and resolve_rule(trained)):
        return
    if trained is not None:
        message = f'{name} was trained with preset="{trained}". Use that.'
    elif not resolve_rule(preset).constants:
        message = (
            f"{name} was trained without Weight Standardization. Use preset='aws' and "
            "WeightStandardization(preset='aws').start_from_plain(params)."
        )
    else:
        return
    warnings.warn(
        "The kernels of a checkpoint compute the same function only with the convention of Weight "
        f"Standardization that they were trained with, received preset={preset!r}. {message}",
        stacklevel=3,
    )


@functools.cache
def _entries(name: str) -> tuple[_Entry, ...]:
    """Lists every array of an architecture, from the model itself and the rules above."""
    spec = checkpoint_spec(name)
    model = spec.make_model()
    init = functools.partial(model.init, train=False)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    leaves: Any = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0), images))
    # In PyTorch the batch part of batch-channel normalization is a module of its own.
    prefix = ["pbn"] if spec.norm == "bcn" else []
    entries = []
    for path, array in leaves.items():
        leaf, layout = _LEAVES[path[-1], array.ndim]
        modules = [_torch_module(module) for module in path[1:-1]]
        modules += prefix if path[0] == "batch_stats" else []
        entries.append(_Entry(path, array, ".".join([*modules, leaf]), layout))
    return tuple(entries)


def _torch_module(module: str) -> str:
    if block := re.fullmatch(r"stage(\d+)_block(\d+)", module):
        stage, index = map(int, block.groups())
        return f"layer{stage}.{index - 1}"
    pattern, name = next(rule for rule in _MODULES if re.fullmatch(rule[0], module))
    return re.sub(pattern, name, module)


def _strip_prefix(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays without the prefixes that wrappers of the model add to every key."""
    arrays: Mapping[str, np.ndarray] = state_dict.get("state_dict", state_dict)
    while prefixes := [p for p in _WRAPPERS if arrays and all(k.startswith(p) for k in arrays)]:
        arrays = {key.removeprefix(prefixes[0]): array for key, array in arrays.items()}
    return dict(arrays)


def _converted(array: np.ndarray, entry: _Entry) -> np.ndarray:
    array = np.asarray(array).reshape(entry.expected.shape)
    return entry.layout.to_flax(array).astype(entry.array.dtype)


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Returns whether a shape is the one expected, up to axes of length one."""
    axes = [size for size in shape if size != 1]
    # Two axes of the same length might be in another order, as in a 1x1 kernel in HWIO.
    distinct = len(set(axes)) == len(axes)
    return shape == expected or (distinct and axes == [size for size in expected if size != 1])


def _converts(dtype: np.dtype, expected: np.dtype) -> bool:
    floats = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(expected, jnp.floating)
    return floats or np.can_cast(dtype, expected)


def _untracked(entries: tuple[_Entry, ...]) -> set[str]:
    """Returns keys of PyTorch's batch normalization that have no counterpart in Flax's."""
    means = [e.key for e in entries if e.path[-1] == "mean" and ".pbn." not in e.key]
    return {key.replace("running_mean", "num_batches_tracked") for key in means}


def _problems(arrays: Mapping[str, np.ndarray], entries: tuple[_Entry, ...]) -> list[str]:
    """Returns one line for each kind of difference between the keys and those expected."""
    expected = {entry.key: entry.expected for entry in entries}
    known = {*expected, *_untracked(entries)}
    pairs = [(key, np.asarray(arrays[key]), e) for key, e in expected.items() if key in arrays]
    differences = {
        "missing": [key for key in expected if key not in arrays],
        "extra": [key for key in arrays if key not in known],
        "misshapen": [
            f"{key} {array.shape}, not {e.shape}"
            for key, array, e in pairs
            if not _fits(array.shape, e.shape)
        ],
        "of another dtype": [
            f"{key} {array.dtype}, not {e.dtype}"
            for key, array, e in pairs
            if not _converts(array.dtype, e.dtype)
        ],
    }
    return _listed(differences)


def _bad_values(
    arrays: Mapping[str, np.ndarray],
    entries: tuple[_Entry, ...],
    leaves: Mapping[tuple[str, ...], np.ndarray],
) -> list[str]:
    """Returns one line for each kind of value that no model can have."""
    bad: dict[str, list[str]] = {"not finite": [], "beyond float32": [], "negative": []}
    for entry in entries:
        array = np.asarray(arrays[entry.key])
        if not np.isfinite(array).all():
            bad["not finite"].append(entry.key)
        elif not np.isfinite(leaves[entry.path]).all():
            bad["beyond float32"].append(entry.key)
        if entry.path[-1] == "var" and (array < 0).any():
            bad["negative"].append(entry.key)
    return _listed(bad)


def _listed(differences: Mapping[str, list[str]]) -> list[str]:
    return [
        f"  {kind} ({len(keys)}): {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for kind, keys in differences.items()
        if keys
    ]


def _hint(arrays: Mapping[str, np.ndarray]) -> str:
    try:
        return f"They are those of {guess_checkpoint_name(arrays)}: pass that name."
    except ValueError:
        return (
            "They are those of no architecture known here: a part of the file may be missing, the "
            "head may be for other classes than ImageNet's 1000, or arrays need astype."
        )
