"""Weight Standardization and its relatives, with derivatives in closed form."""

import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import statistics_dtype
from wsbcn_flax.ops._rules import StandardizationRule, resolve_rule


def standardize(
    kernel: jax.Array,
    *,
    preset: str | StandardizationRule = "bcn",
    out_axis: int = -1,
    gain: jax.Array | None = None,
) -> jax.Array:
    """Standardizes a kernel for each output channel over its fan-in.

    With the mean and variance over all axes but ``out_axis``,

        W_hat = gain * (W - mean(W)) / denominator(W)

    where the preset names the denominator (see ``StandardizationRule``): "bcn" (the default),
    "official", "official_tf", "bit", "timm" and "nfnet" are the field's conventions of Weight
    Standardization; "wn" and "cwn" are weight normalization and centered weight normalization.
    Computed in float32 or wider and returned in the kernel's dtype. The derivative is the closed
    form (a custom VJP: reverse mode, any number of times) and is finite at a constant kernel.

    Args:
        kernel: [..., out], for example HWIO. A grouped convolution's I is already in / groups.
        preset: a convention's name, or a rule of your own.
        out_axis: the axis of output channels; -2 for ``nn.ConvTranspose(transpose_kernel=True)``.
        gain: [out], or None for one.

    Returns:
        An array of the kernel's shape and dtype.

    Raises:
        TypeError: if the kernel is not floating-point.
        ValueError: for an unknown preset, an axis out of range, a fan-in of one (it would
            standardize to zero), or a gain of another shape.

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
    if gain is not None and gain.shape != (features,):
        raise ValueError(
            f"gain must have one value per output channel, shape ({features},), received "
            f"{gain.shape}."
        )
    dtype = statistics_dtype(kernel.dtype)
    hat = cast(jax.Array, _standardize(rule, out_axis, kernel.astype(dtype)))
    if gain is not None:
        hat = hat * jnp.expand_dims(gain.astype(dtype), _fan_in_axes(kernel.ndim, out_axis))
    return hat.astype(kernel.dtype)


def _fan_in_axes(ndim: int, out_axis: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis != out_axis)


# A custom VJP: autodiff of the formula costs several more passes over the kernel, on every backend.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _standardize(rule: StandardizationRule, out_axis: int, kernel: jax.Array) -> jax.Array:
    return _standardize_forward(rule, out_axis, kernel)[0]


def _standardize_forward(rule, out_axis, kernel):
    """One reduction pass and one elementwise pass."""
    axes = _fan_in_axes(kernel.ndim, out_axis)
    fan_in = math.prod(kernel.shape) // kernel.shape[out_axis]
    if rule.center:
        # About weights of the kernel's own, nothing cancels whatever the mean is. Two of them, as
        # XLA for CPU writes out what two reductions share.
        first, last = (_corner(kernel, axes, index) for index in (0, -1))
        mean = jnp.mean(_subtract(kernel, first, axes), axes)
        square = jnp.sum(lax.square(_subtract(kernel, last, axes)), axes)
        center = first + mean
        total = jnp.maximum(square - fan_in * lax.square(mean + (first - last)), 0)
    else:
        center, total = None, jnp.sum(lax.square(kernel), axes)
    inverse, curvature = _inverse_denominator(rule, fan_in, total)
    hat = _subtract(kernel, center, axes) * jnp.expand_dims(inverse, axes)
    return hat, (kernel, center, inverse, curvature)


def _standardize_backward(rule, out_axis, residuals, cotangent):
    """Two reductions and one elementwise pass, over the cotangent g and the centred kernel u.

    dW = r (g - mean(g)) - u c sum(g u), without mean(g) where the rule does not centre.
    """
    kernel, center, inverse, curvature = residuals
    axes = _fan_in_axes(kernel.ndim, out_axis)
    along = jnp.sum(cotangent * kernel, axes)
    gradient = jnp.expand_dims(inverse, axes) * cotangent
    if rule.center:
        total = jnp.sum(cotangent, axes)
        along -= center * total
        fan_in = math.prod(kernel.shape) // total.size
        gradient -= jnp.expand_dims(inverse * total / fan_in, axes)
    centred = _subtract(kernel, center, axes)
    return (gradient - centred * jnp.expand_dims(curvature * along, axes),)


_standardize.defvjp(_standardize_forward, _standardize_backward)


def _corner(kernel, axes, index):
    return kernel[tuple(index if axis in axes else slice(None) for axis in range(kernel.ndim))]


def _subtract(kernel, center, axes):
    return kernel if center is None else kernel - jnp.expand_dims(center, axes)


def _inverse_denominator(rule: StandardizationRule, fan_in: int, total: jax.Array):
    """r(s) = 1 / denominator and c(s) = -2 r'(s), for the sum of squares s, per output channel."""
    divisor = fan_in - 1 if rule.unbiased else fan_in
    match rule.denominator:
        case "sqrt_var_plus_eps":
            inverse = lax.rsqrt(total / divisor + rule.epsilon)
            return inverse, inverse**3 / divisor
        case "std_plus_eps":
            # The root has no derivative at zero; the centred kernel is zero there: none is needed.
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
