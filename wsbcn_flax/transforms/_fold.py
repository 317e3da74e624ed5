"""Weight Standardization folded into the parameters once and for all."""

from wsbcn_flax.ops import StandardizationRule
from wsbcn_flax.transforms._path_rules import PathRule
from wsbcn_flax.transforms._weight_standardization import Params, WeightStandardization


def fold_weight_standardization(
    params: Params,
    *,
    preset: str | StandardizationRule = "bcn",
    where: PathRule = None,
    out_axis: int = -1,
    stacked_axes: int = 0,
) -> Params:
    """Returns plain parameters, for evaluation and export, with standardized kernels.

    With them the plain model (``nn.Conv``) computes the same as the model trained with Weight
    Standardization does with its raw parameters. The result is that of ``WeightStandardization``
    with the same options: gains that a preset learns are multiplied in and dropped.

    Args:
        params: Raw parameters, as training keeps them.
        preset: Convention that they were trained with.
        where: Path rule that they were trained with, such as ``normalized_convolutions(model, x)``.
        out_axis: Axis of output channels that they were trained with.
        stacked_axes: Number of leading axes that count layers.

    Raises:
        TypeError, ValueError: In the same cases as ``WeightStandardization``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.transforms import fold_weight_standardization
        >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 4))
        >>> params = {"conv": {"kernel": kernel}, "norm": {"scale": jnp.ones(4)}}
        >>> kernel = fold_weight_standardization(params)["conv"]["kernel"]
        >>> bool(jnp.abs(kernel.mean((0, 1, 2))).max() < 1e-6)
        True
    """
    return WeightStandardization(
        preset=preset, where=where, out_axis=out_axis, stacked_axes=stacked_axes
    )(params)
