"""Names of the PyTorch checkpoints that can be imported, and their models here."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax

from wsbcn_flax.layers import BatchChannelNorm
from wsbcn_flax.ops._rules import resolve_rule

NormKind = Literal["bn", "gn", "bcn"]

_NORMS: dict[NormKind, Callable[..., nn.Module]] = {
    "bn": functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5),
    "gn": functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-5),
    "bcn": functools.partial(BatchChannelNorm, num_groups=32, statistics="batch"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """The model in this package that has the architecture of a PyTorch checkpoint.

    Attributes:
        model: Name of the network in ``wsbcn_flax.models``.
        norm: Normalization: "bn", "gn" with 32 groups, or "bcn" with 32 groups and an affine map
            per group.
        preset: Convention of Weight Standardization, or None for plain convolutions.

    Raises:
        ValueError: For an unknown normalization or preset.

    Example:
        >>> from wsbcn_flax.transforms import checkpoint_spec
        >>> checkpoint_spec("X-50-32x4d-GN-WS")
        CheckpointSpec(model='ResNeXt50_32x4d', norm='gn', preset='official')
    """

    model: str
    norm: NormKind
    preset: str | None = None

    def __post_init__(self):
        if self.norm not in get_args(NormKind):
            raise ValueError(f"norm must be one of {get_args(NormKind)}, received {self.norm!r}.")
        if self.preset is not None:
            resolve_rule(self.preset)

    def make_model(
        self, *, num_classes: int = 1000, dtype: jax.typing.DTypeLike | None = None
    ) -> nn.Module:
        """Returns the plain network, to be called with parameters standardized by ``preset``."""
        from wsbcn_flax import models  # Imported here, so that the layers need no networks.

        model = getattr(models, self.model)
        return model(num_classes=num_classes, norm=_NORMS[self.norm], dtype=dtype)


def _with_ws(model: str, norm: NormKind) -> CheckpointSpec:
    # The authors' code has epsilon inside the root for BCN, and outside for GN.
    return CheckpointSpec(model=model, norm=norm, preset="bcn" if norm == "bcn" else "official")


# The authors' names, then torchvision's.
_SPECS: dict[str, CheckpointSpec] = {
    "R-50-GN-WS": _with_ws("ResNet50", "gn"),
    "R-101-GN-WS": _with_ws("ResNet101", "gn"),
    "X-50-32x4d-GN-WS": _with_ws("ResNeXt50_32x4d", "gn"),
    "X-101-32x4d-GN-WS": _with_ws("ResNeXt101_32x4d", "gn"),
    "R-50-BCN-WS": _with_ws("ResNet50", "bcn"),
    "R-101-BCN-WS": _with_ws("ResNet101", "bcn"),
    "X-50-32x4d-BCN-WS": _with_ws("ResNeXt50_32x4d", "bcn"),
    **{
        f"resnet{depth}": CheckpointSpec(model=f"ResNet{depth}", norm="bn")
        for depth in (18, 34, 50, 101, 152)
    },
    "resnext50_32x4d": CheckpointSpec(model="ResNeXt50_32x4d", norm="bn"),
}


def checkpoint_names() -> tuple[str, ...]:
    """Lists the architectures that can be imported, first the authors', then torchvision's.

    Example:
        >>> from wsbcn_flax.transforms import checkpoint_names
        >>> checkpoint_names()[:2], checkpoint_names()[-1]
        (('R-50-GN-WS', 'R-101-GN-WS'), 'resnext50_32x4d')
    """
    return tuple(_SPECS)


def checkpoint_spec(name: str) -> CheckpointSpec:
    """Returns the model in this package that has the architecture of that name.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in _SPECS:
        raise ValueError(f"name must be one of {', '.join(_SPECS)}, received {name!r}.")
    return _SPECS[name]
