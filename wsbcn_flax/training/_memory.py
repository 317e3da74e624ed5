"""What a compiled step needs of a device's memory, and the largest that fits."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Fit(NamedTuple):
    """The largest size that fits, and the bytes per device of every size that was compiled."""

    size: int
    tried: dict[int, int]


def device_bytes(compiled: Any) -> int:
    """Bytes that a program needs on each device: arguments, outputs, temporaries and code.

    Args:
        compiled: what ``jax.jit(step).lower(*arguments).compile()`` returns. An output that takes
            a donated argument's place counts once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.training import device_bytes
        >>> x = jnp.ones((1024, 1024))
        >>> device_bytes(jax.jit(lambda x: 2 * x).lower(x).compile()) // 2**20
        8
    """
    memory = compiled.memory_analysis()
    sizes = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        -memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    return sum(sizes)


def largest_that_fits(
    sizes: Iterable[int], bytes_needed: Callable[[int], int], *, limit: int
) -> Fit:
    """Finds the largest size that needs no more than ``limit`` bytes, by bisection.

    The largest of all is tried first: a batch that is one micro-batch needs no sum of gradients,
    and so may need less than one of two.

    Args:
        sizes: such as the micro-batches that divide a batch.
        bytes_needed: of a size, as ``device_bytes`` gives it; else never less for a larger one.
        limit: bytes of a device.

    Raises:
        ValueError: if none fits, or there are none.

    Example:
        >>> from wsbcn_flax.training import largest_that_fits
        >>> largest_that_fits([1, 2, 4, 8, 16], lambda size: 100 * size, limit=500)
        Fit(size=4, tried={16: 1600, 4: 400, 8: 800})
    """
    ordered = sorted(set(sizes))
    tried: dict[int, int] = {}
    # All below `low` fit, none from `high` on does.
    low, high = 0, len(ordered)
    middle = high - 1
    while low < high:
        size = ordered[middle]
        tried[size] = bytes_needed(size)
        low, high = (middle + 1, high) if tried[size] <= limit else (low, middle)
        middle = (low + high) // 2
    if low == 0:
        raise ValueError(
            f"One size at least must fit into the limit of {limit:,} bytes, received {ordered}, "
            f"which need {tried}. Use a narrower dtype, rematerialization, more devices or a "
            "smaller model."
        )
    return Fit(ordered[low - 1], tried)
