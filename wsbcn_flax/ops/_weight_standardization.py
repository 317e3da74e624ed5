"""Weight Standardization and its relatives, with derivatives in closed form."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import statistics_dtype
from wsbcn_flax.ops._explicit_axes import with_automatic_axes
from wsbcn_flax.ops._one_kernel import column_kernel, in_one_kernel, linear_with_transpose, only
from wsbcn_flax.ops._rules import StandardizationRule, resolve_rule

_LARGEST_FAN_IN = 4608  # Columns of both kernels then fit in a TPU's vector memory.


def standardize(
    kernel: jax.Array,
    *,
    preset: str | StandardizationRule = "bcn",
    out_axis: int = -1,
    gain: jax.Array | None = None,
    shift: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Standardizes a kernel for each output channel over its fan-in.

    With the mean and variance over all axes but ``out_axis``,

        W_hat = gain * (W - mean(W)) / denominator(W) + shift

    where the preset names the denominator (see ``StandardizationRule``). "bcn" (the default),
    "official", "official_tf", "bit", "timm", "nfnet" and "aws" are the field's conventions for
    Weight Standardization. "wn" and "cwn" are weight normalization and centered weight
    normalization; "wn" subtracts no mean. The computation is in float32 or wider. Derivatives are
    the closed form, in reverse and forward mode and of any order, and are finite at a constant
    kernel.

    Args:
        kernel: Kernel [..., out], for example HWIO. Grouped convolutions have I = in / groups.
        preset: Name of a convention, or a rule of your own.
        out_axis: Axis of output channels; -2 for ``nn.ConvTranspose(transpose_kernel=True)``.
        gain: Gain [out], or None for one.
        shift: Shift [out], or None for zero. No gradient flows to the gain and shift of "aws".
        dtype: Output dtype; defaults to the dtype of the kernel.

    Returns:
        An array of the kernel's shape.

    Raises:
        TypeError: If the kernel is not floating-point.
        ValueError: For an unknown preset, an axis out of range, or a gain or shift of another
            shape. For a fan-in of one under a rule that centres (the kernel would be zero).

    References:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, https://arxiv.org/abs/1903.10520

    Example:
        >>> import jax
        >>> from wsbcn_flax import standardize
        >>> kernel = 3.0 + jax.random.normal(jax.random.key(0), (3, 3, 16, 32))
        >>> hat = standardize(kernel)
        >>> bool(abs(hat.mean((0, 1, 2))).max() < 1e-5), bool(abs(hat.std() - 1) < 1e-2)
        (True, True)
    """
    rule = resolve_rule(preset)
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(f"standardize needs a floating-point kernel, received {kernel.dtype}.")
    if not -kernel.ndim <= out_axis < kernel.ndim:
        raise ValueError(
            f"out_axis must name an axis of the kernel, received {out_axis} for {kernel.shape}."
        )
    out_axis %= kernel.ndim
    features = kernel.shape[out_axis]
    fan_in = math.prod(kernel.shape) // features if features else 0
    if rule.center and fan_in < 2:
        raise ValueError(
            f"Weight standardization needs a fan-in of at least 2, received {fan_in} from kernel "
            f"{kernel.shape} with out_axis={out_axis}: centred, it would be zero. Leave 1x1 "
            "depthwise kernels out."
        )
    for name, array in {"gain": gain, "shift": shift}.items():
        if array is not None and array.shape != (features,):
            raise ValueError(
                f"{name} must have one value per output channel, shape ({features},), received "
                f"{array.shape}."
            )
    if rule.constants:
        gain, shift = lax.stop_gradient((gain, shift))
    dtype = jnp.dtype(kernel.dtype if dtype is None else dtype)
    standardized = functools.partial(_standardized, rule, out_axis, dtype)
    return with_automatic_axes(standardized, (kernel, gain, shift), like=kernel)


def restoring_affine(
    kernel: jax.Array, rule: StandardizationRule, out_axis: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the gain and shift [out] with which ``standardize`` returns the kernel as it is."""
    wide = kernel.astype(statistics_dtype(kernel.dtype))
    center, inverse, _ = _statistics(rule, out_axis % kernel.ndim, wide)
    shift = jnp.zeros_like(inverse) if center is None else center
    return (1 / inverse).astype(kernel.dtype), shift.astype(kernel.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _standardized(rule: StandardizationRule, out_axis: int, dtype, kernel, gain, shift):
    """Returns the standardized kernel times the gain plus the shift, in ``dtype``."""
    wide = statistics_dtype(kernel.dtype)
    axes = _fan_in_axes(kernel, out_axis)
    is_last = gain is None and shift is None
    hat: Any = _standardize(rule, out_axis, dtype if is_last else wide, kernel.astype(wide))
    if gain is not None:
        hat = hat * jnp.expand_dims(gain.astype(wide), axes)
    if shift is not None:
        hat = hat + jnp.expand_dims(shift.astype(wide), axes)
    return hat.astype(dtype)


def _fan_in_axes(kernel: jax.Array, out_axis: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(kernel.ndim) if axis != out_axis)


def _fan_in(kernel: jax.Array, out_axis: int) -> int:
    return math.prod(kernel.shape) // kernel.shape[out_axis]


# A custom derivative. Autodiff of the formula would cost several more passes over the kernel, and
# keep the centred kernel in addition to the kernel.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _standardize(
    rule: StandardizationRule, out_axis: int, dtype: Any, kernel: jax.Array
) -> jax.Array:
    function = functools.partial(_as_written, rule, out_axis, dtype)
    if not _has_kernel(kernel, out_axis):
        return function(kernel)
    return in_one_kernel(function, functools.partial(_by_kernel, rule, dtype), kernel)


@_standardize.defjvp
def _standardize_jvp(rule, out_axis, dtype, primals, tangents):
    (kernel,), (tangent,) = primals, tangents
    push_forward = functools.partial(_push_forward, out_axis)
    by_kernel = functools.partial(_pull_back_by_kernel, rule)
    pushed = linear_with_transpose(
        push_forward,
        push_forward,  # It is its own transpose.
        (kernel, *_statistics(rule, out_axis, kernel)),
        tangent,
        kernel=by_kernel if _has_kernel(kernel, out_axis) else None,
    )
    return _standardize(rule, out_axis, dtype, kernel), pushed.astype(dtype)


def _as_written(rule, out_axis, dtype, kernel):
    center, inverse, _ = _statistics(rule, out_axis, kernel)
    axes = _fan_in_axes(kernel, out_axis)
    return (_subtract(kernel, center, axes) * jnp.expand_dims(inverse, axes)).astype(dtype)


def _push_forward(out_axis, residuals, tangent):
    """Pushes a tangent t forward: r (t - mean(t)) - u c sum(u t), with u the centred kernel."""
    # There is no mean(t) where the rule does not centre. sum(u t) is computed as
    # sum(W t) - mean(W) sum(t): both this sum and the last pass need u, so XLA for CPU would write
    # u out.
    kernel, center, inverse, curvature = residuals
    axes = _fan_in_axes(kernel, out_axis)
    at = functools.partial(_at, kernel=kernel, out_axis=out_axis)
    along = jnp.sum(tangent * kernel, axes)
    if center is None:
        return tangent * at(inverse) - kernel * at(curvature * along)
    total = jnp.sum(tangent, axes)
    along = -curvature * (along - center * total)
    rest = center * along + inverse * total / _fan_in(kernel, out_axis)
    return tangent * at(inverse) + kernel * at(along) - at(rest)


def _at(values, kernel, out_axis):
    # One operation, whose transpose reduces all axes at once, axes of length 1 included. If these
    # were left out, XLA for CPU (jaxlib 0.10.2) would take four times as long for a 1x1 kernel.
    return lax.broadcast_in_dim(values, kernel.shape, (out_axis,))


def _statistics(rule, out_axis, kernel):
    """Returns mean (None where the rule does not centre), r and c, one per output channel."""
    axes, fan_in = _fan_in_axes(kernel, out_axis), _fan_in(kernel, out_axis)
    if not rule.center:
        return None, *_inverse_denominator(rule, fan_in, jnp.sum(lax.square(kernel), axes))
    # Sums about some of the kernel's own weights do not cancel, whatever the mean is. Each sum has
    # its own weight, since XLA for CPU writes out what two reductions share.
    first, last = (_corner(kernel, axes, index) for index in (0, -1))
    mean = jnp.mean(_subtract(kernel, first, axes), axes)
    square = jnp.sum(lax.square(_subtract(kernel, last, axes)), axes)
    total = jnp.maximum(square - fan_in * lax.square(mean + (first - last)), 0)
    return first + mean, *_inverse_denominator(rule, fan_in, total)


# On a TPU the Pallas kernel holds all weights of an output channel at once. So one pass over memory
# takes the variance about the mean, and standardizes and rounds the weights.
def _has_kernel(kernel: jax.Array, out_axis: int) -> bool:
    """Returns whether Pallas kernels for TPU can take the sums along the fan-in."""
    fits = out_axis == kernel.ndim - 1 and _fan_in(kernel, out_axis) <= _LARGEST_FAN_IN
    return fits and kernel.dtype == jnp.float32


def _by_kernel(rule, dtype, kernel):
    def of_columns(weights):
        centred, _, inverse, _ = _statistics_of_columns(rule, weights)
        return (centred * inverse).astype(dtype)

    hat = column_kernel(of_columns, kernel.reshape(-1, kernel.shape[-1]))
    return hat.reshape(kernel.shape)


def _pull_back_by_kernel(rule, wanted, residuals, cotangent):
    """Transposes ``_push_forward`` by one pass that reduces, and one that XLA may fuse."""
    kernel, *_ = residuals

    def of_columns(weights, cotangent):
        centred, center, inverse, curvature = _statistics_of_columns(rule, weights)
        along = -curvature * jnp.sum(cotangent * centred, 0, keepdims=True)
        if center is None:
            return inverse, along, jnp.zeros_like(along)
        mean = jnp.mean(cotangent, 0, keepdims=True)
        return inverse, along, center * along + inverse * mean

    matrices = (array.reshape(-1, array.shape[-1]) for array in (kernel, cotangent))
    rows = column_kernel(of_columns, *matrices)
    inverse, along, rest = (_at(row[0], kernel, kernel.ndim - 1) for row in rows)
    return only(wanted, cotangent * inverse + (kernel * along - rest))


def _statistics_of_columns(rule, weights):
    """Returns the centred columns of a matrix, their means, and r and c, each one row."""
    center = jnp.mean(weights, 0, keepdims=True) if rule.center else None
    centred = weights if center is None else weights - center
    total = jnp.sum(lax.square(centred), 0, keepdims=True)
    return centred, center, *_inverse_denominator(rule, weights.shape[0], total)


def _corner(kernel, axes, index):
    return kernel[tuple(index if axis in axes else slice(None) for axis in range(kernel.ndim))]


def _subtract(kernel, center, axes):
    return kernel if center is None else kernel - jnp.expand_dims(center, axes)


def _inverse_denominator(rule: StandardizationRule, fan_in: int, total: jax.Array):
    """Computes r(s) = 1 / denominator and c(s) = -2 r'(s) from each channel's sum of squares s."""
    divisor = fan_in - 1 if rule.unbiased else fan_in
    match rule.denominator:
        case "sqrt_var_plus_eps":
            inverse = lax.rsqrt(total / divisor + rule.epsilon)
            return inverse, inverse**3 / divisor
        case "std_plus_eps":
            # The root has no derivative at zero, and needs none: there the centred kernel is zero.
            constant = total == 0
            std = jnp.sqrt(jnp.where(constant, 1, total) / divisor)
            inverse = 1 / (jnp.where(constant, 0, std) + rule.epsilon)
            return inverse, jnp.where(constant, 0, lax.square(inverse) / (divisor * std))
        case "sqrt_sum":
            inverse = lax.rsqrt(jnp.maximum(total, rule.epsilon))
            return inverse, jnp.where(total > rule.epsilon, inverse**3, 0)
        case "norm":
            inverse = lax.rsqrt(total + rule.epsilon)
            return inverse, inverse**3
