"""Flax's convolutions and dense layer with a standardized kernel."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from wsbcn_flax.ops import StandardizationRule, standardize
from wsbcn_flax.ops._rules import resolve_rule


class _StandardizedKernel(nn.Module):
    """Base class that standardizes the parameter ``kernel`` before its layer computes with it.

    The stored parameter stays raw, so that the parameter tree is the plain layer's. Rules with a
    learnable gain add ``gain`` [features]; rules with constants add ``constant_gain`` and
    ``constant_shift``.
    """

    @property
    def _out_axis(self) -> int:
        return -1

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Returns what Flax's ``Module.param`` does, with the kernel standardized."""
        value = super().param(name, *args, **kwargs)
        if name != "kernel":
            return value
        rule = resolve_rule(self.preset)
        shape = (value.shape[self._out_axis],)
        affine = {
            argument: super(_StandardizedKernel, self).param(
                parameter, nn.initializers.constant(start), shape, self.param_dtype
            )
            for argument, (parameter, start) in rule.channel_parameters.items()
        }
        return standardize(value, preset=rule, out_axis=self._out_axis, **affine)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer to floating-point ``inputs``, as the Flax layer of that name does."""
        if not jnp.issubdtype(jnp.result_type(inputs), jnp.floating):
            raise TypeError(
                f"{type(self).__name__} needs floating-point inputs, received "
                f"{jnp.result_type(inputs)} of shape {jnp.shape(inputs)}. Convert images first, "
                "for example images.astype(jnp.float32) / 255."
            )
        return super().__call__(inputs)


class WSConv(_StandardizedKernel, nn.Conv):
    """``nn.Conv`` with Weight Standardization: same arguments, same parameters, 1-D to 3-D.

    The kernel [*kernel_size, in / groups, features] is standardized for each output channel over
    its other axes. This happens in float32 or wider, before the kernel is cast to ``dtype`` and
    before ``mask`` is applied. See ``wsbcn_flax.standardize`` for the formula. The layer is meant
    for convolutions that a normalization follows; leave the classifier head plain.

    Attributes:
        preset: Convention, "bcn" (default), "official", "official_tf", "bit", "timm", "nfnet",
            "wn", "cwn" or "aws", or a ``StandardizationRule``. "nfnet", "wn" and "cwn" have a
            learnable gain and add a parameter ``gain`` [features]. "aws" adds two parameters that
            are not trained, ``constant_gain`` and ``constant_shift``.

    Raises:
        TypeError: For inputs that are not floating-point.
        ValueError: For an unknown preset, or a fan-in of one.

    References:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, https://arxiv.org/abs/1903.10520

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax import WSConv
        >>> conv = WSConv(64, (3, 3), use_bias=False)
        >>> variables = conv.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)))
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'kernel': (3, 3, 16, 64)}}
    """

    preset: str | StandardizationRule = "bcn"


class WSConvTranspose(_StandardizedKernel, nn.ConvTranspose):
    """``nn.ConvTranspose`` with Weight Standardization: same arguments, same parameters.

    Output channels are the kernel's last axis, or its second to last with ``transpose_kernel``.

    Attributes:
        preset: Convention, as in ``WSConv``.

    Raises:
        TypeError: For inputs that are not floating-point.
        ValueError: For an unknown preset, or a fan-in of one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax import WSConvTranspose
        >>> conv = WSConvTranspose(8, (2, 2), strides=(2, 2))
        >>> y, _ = conv.init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 16)))
        >>> y.shape
        (1, 8, 8, 8)
    """

    preset: str | StandardizationRule = "bcn"

    @property
    def _out_axis(self) -> int:
        return -2 if self.transpose_kernel else -1


class WSDense(_StandardizedKernel, nn.Dense):
    """``nn.Dense`` with Weight Standardization: same arguments, same parameters.

    Use it inside a network, where a normalization follows. On the classifier head it makes losses
    explode.

    Attributes:
        preset: Convention, as in ``WSConv``.

    Raises:
        TypeError: For inputs that are not floating-point.
        ValueError: For an unknown preset, or a fan-in of one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax import WSDense
        >>> dense = WSDense(8)
        >>> y, variables = dense.init_with_output(jax.random.key(0), jnp.ones((4, 16)))
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'bias': (8,), 'kernel': (16, 8)}}
    """

    preset: str | StandardizationRule = "bcn"
