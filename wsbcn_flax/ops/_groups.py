"""Arithmetic on groups of channels."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Groups(NamedTuple):
    """Arithmetic on the groups of channels.

    Attributes:
        average: Function [B, C] -> [B, C] that gives each channel the mean of its group.
        spread: Function [B, num_groups] -> [B, C] that gives each channel its group's value.
    """

    average: Callable[[jax.Array], jax.Array]
    spread: Callable[[jax.Array], jax.Array]


def groups_of(num_groups: int, features: int) -> Groups:
    """Returns the arithmetic on ``num_groups`` groups of ``features`` channels in all."""
    mean = functools.partial(_group_mean, num_groups=num_groups)
    spread = functools.partial(_spread, features=features)
    return Groups(lambda values: spread(mean(values)), spread)


def groups_in_kernel(num_groups: int, features: int) -> Groups:
    """Returns the arithmetic of ``groups_of`` in operations that Pallas has for TPU.

    Sums over channels are products with a matrix of zeros and ones. Each number in float32 is the
    sum of three parts in bfloat16, and one pass for each part makes the product exact.
    """
    size = features // num_groups

    def product(values, contracted):
        channel = lax.broadcasted_iota(jnp.int32, (num_groups, features), 1)
        first = size * lax.broadcasted_iota(jnp.int32, (num_groups, features), 0)
        member = ((channel >= first) & (channel < first + size)).astype(jnp.bfloat16)
        dimensions = ((1,), (contracted,)), ((), ())
        total = jnp.zeros((values.shape[0], member.shape[1 - contracted]), values.dtype)
        for _ in range(3):
            part = values.astype(jnp.bfloat16)
            values = values - part.astype(values.dtype)
            total += lax.dot_general(part, member, dimensions, preferred_element_type=total.dtype)
        return total

    @jax.custom_vjp
    def spread(values):
        return product(values, 0)

    spread.defvjp(lambda values: (spread(values), ()), lambda _, of: (product(of, 1),))
    return Groups(lambda values: product(product(values, 1) / size, 0), spread)


def _group_mean(values: jax.Array, num_groups: int) -> jax.Array:
    """Averages [B, C] over each group's channels to [B, num_groups]."""
    size = values.shape[-1] // num_groups
    return lax.platform_dependent(
        values,
        tpu=lambda values: _product(values, _membership(num_groups, size, values.dtype) / size),
        default=lambda values: jnp.mean(values.reshape(-1, num_groups, size), -1),
    )


def _spread(values: jax.Array, features: int) -> jax.Array:
    """Copies each group's value [B, num_groups] to each of its channels, [B, C]."""
    batch, num_groups = values.shape
    size = features // num_groups
    grouped = (batch, num_groups, size)
    return lax.platform_dependent(
        values,
        tpu=lambda values: _product(values, _membership(num_groups, size, values.dtype).T),
        default=lambda values: jnp.broadcast_to(values[..., None], grouped).reshape(batch, -1),
    )


# A TPU lays channels out along its vectors' lanes. Splitting that axis into groups takes several
# copies of every array; a product with a matrix of zeros and ones is one operation.
def _membership(num_groups: int, size: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns a matrix [C, num_groups] that is one where a channel belongs to a group."""
    channel = lax.broadcasted_iota(jnp.int32, (num_groups * size, num_groups), 0)
    group = lax.broadcasted_iota(jnp.int32, (num_groups * size, num_groups), 1)
    return (channel // size == group).astype(dtype)


def _product(values: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.matmul(values, matrix, precision=lax.Precision.HIGHEST)
