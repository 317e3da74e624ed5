"""NNX's convolutions and linear layer with a standardized kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wsbcn_flax.ops import StandardizationRule, standardize
from wsbcn_flax.ops._rules import resolve_rule


class _StandardizedKernel(nnx.Module):
    """Base class that standardizes the kernel before its layer computes with it.

    The stored parameter stays raw, so that the state is the plain layer's. Rules with a learnable
    gain add ``gain`` [out_features]; rules with constants add ``constant_gain`` and
    ``constant_shift``. These parameters draw no random numbers.
    """

    def __init__(self, *args: Any, preset: str | StandardizationRule = "bcn", **kwargs: Any):
        rule = resolve_rule(preset)
        super().__init__(*args, **kwargs)
        layer: Any = self
        self.preset = preset
        for parameter, start in rule.channel_parameters.values():
            array = jnp.full(layer.out_features, start, layer.param_dtype)
            setattr(self, parameter, nnx.Param(array))

    @property
    def _out_axis(self) -> int:
        return -1

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Applies the layer to floating-point ``inputs``, as the NNX layer of that name does."""
        if not jnp.issubdtype(jnp.result_type(inputs), jnp.floating):
            raise TypeError(
                f"{type(self).__name__} needs floating-point inputs, received "
                f"{jnp.result_type(inputs)} of shape {jnp.shape(inputs)}. Convert images first, "
                "for example images.astype(jnp.float32) / 255."
            )
        layer: Any = self
        affine = {
            argument: getattr(self, parameter)[...]
            for argument, (parameter, _) in resolve_rule(self.preset).channel_parameters.items()
        }
        kernel = standardize(
            layer.kernel[...], preset=self.preset, out_axis=self._out_axis, **affine
        )
        # A twin holds the standardized kernel, so that mask and dtype apply after standardization.
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), kernel=kernel)
        plain: Any = super(_StandardizedKernel, twin)
        return plain.__call__(inputs, *args, **kwargs)


class WSConv(_StandardizedKernel, nnx.Conv):
    """``nnx.Conv`` with Weight Standardization: same arguments, same state, 1-D to 3-D.

    The kernel [*kernel_size, in / groups, out] is standardized for each output channel over its
    other axes. This happens in float32 or wider, before ``mask`` and ``dtype`` are applied. See
    ``wsbcn_flax.standardize`` for the formula. The layer is meant for convolutions that a
    normalization follows; leave the classifier head plain. It draws the same random numbers as
    ``nnx.Conv``.

    Args:
        *args: Arguments of ``nnx.Conv``.
        preset: Convention, "bcn" (default), "official", "official_tf", "bit", "timm", "nfnet",
            "wn", "cwn" or "aws", or a ``StandardizationRule``. "nfnet", "wn" and "cwn" have a
            learnable gain and add a parameter ``gain`` [out_features]. "aws" adds two parameters
            that are not trained, ``constant_gain`` and ``constant_shift``.
        **kwargs: Keyword arguments of ``nnx.Conv``.

    Raises:
        TypeError: For inputs that are not floating-point.
        ValueError: For an unknown preset, or, when called, a fan-in of one.

    References:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, https://arxiv.org/abs/1903.10520

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx import WSConv
        >>> conv = WSConv(16, 64, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
        >>> conv(jnp.ones((1, 8, 8, 16))).shape
        (1, 8, 8, 64)
    """


class WSConvTranspose(_StandardizedKernel, nnx.ConvTranspose):
    """``nnx.ConvTranspose`` with Weight Standardization: same arguments, same state.

    Output channels are the kernel's last axis, or its second to last with ``transpose_kernel``.

    Args:
        *args: Arguments of ``nnx.ConvTranspose``.
        preset: Convention, as in ``WSConv``.
        **kwargs: Keyword arguments of ``nnx.ConvTranspose``.

    Raises:
        TypeError: For inputs that are not floating-point.
        ValueError: For an unknown preset, or, when called, a fan-in of one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx import WSConvTranspose
        >>> conv = WSConvTranspose(16, 8, (2, 2), strides=(2, 2), rngs=nnx.Rngs(0))
        >>> conv(jnp.ones((1, 4, 4, 16))).shape
        (1, 8, 8, 8)
    """

    @property
    def _out_axis(self) -> int:
        return -2 if self.transpose_kernel else -1


class WSLinear(_StandardizedKernel, nnx.Linear):
    """``nnx.Linear`` with Weight Standardization: same arguments, same state.

    Use it inside a network, where a normalization follows. On the classifier head it makes losses
    explode.

    Args:
        *args: Arguments of ``nnx.Linear``.
        preset: Convention, as in ``WSConv``.
        **kwargs: Keyword arguments of ``nnx.Linear``.

    Raises:
        TypeError: For inputs that are not floating-point.
        ValueError: For an unknown preset, or, when called, a fan-in of one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx import WSLinear
        >>> linear = WSLinear(16, 8, rngs=nnx.Rngs(0))
        >>> linear(jnp.ones((4, 16))).shape
        (4, 8)
    """
