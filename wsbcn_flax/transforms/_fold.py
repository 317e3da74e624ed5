"""Weight Standardization done once and for all."""

from typing import Any

from wsbcn_flax.ops import StandardizationRule
from wsbcn_flax.transforms._path_rules import PathRule
from wsbcn_flax.transforms._weight_standardization import Params, WeightStandardization


def fold_weight_standardization(
    params: Params, *, preset: str | StandardizationRule = "bcn", where: PathRule = None
) -> dict[str, Any]:
    """Plain parameters for evaluation and export, whose kernels are standardized already.

    The plain model (``nn.Conv``) computes with them what the model trained with Weight
    Standardization computes with its raw ones. It is ``WeightStandardization(preset=preset,
    where=where)(params)``; gains that a preset learns are multiplied in and dropped.

    Args:
        params: raw parameters, as training keeps them.
        preset: the convention they were trained with.
        where: the path rule they were trained with.

    Raises:
        ValueError: as ``WeightStandardization``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.transforms import fold_weight_standardization
        >>> params = {"conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 4))}}
        >>> kernel = fold_weight_standardization(params)["conv"]["kernel"]
        >>> bool(jnp.abs(kernel.mean((0, 1, 2))).max() < 1e-6)
        True
    """
    return WeightStandardization(preset=preset, where=where)(params)
