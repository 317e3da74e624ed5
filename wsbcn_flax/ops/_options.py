"""The options of batch-channel normalization, and their checks."""

import functools
import numbers
from collections.abc import Callable, Hashable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Statistics = Literal["batch", "estimate"]
Order = Literal["update_first", "normalize_first"]
Rate = float | Callable[[jax.Array], jax.Array | float]


def check_options(*, statistics: str, order: str, rate: Rate, epsilon: float) -> None:
    """Raises for an option that batch-channel normalization does not accept.

    Raises:
        TypeError: For a rate, or a value of its schedule, that is not one number.
        ValueError: For an unknown name, or a number outside its range.
    """
    if statistics not in get_args(Statistics):
        raise ValueError(
            f"statistics must be one of {get_args(Statistics)}, received {statistics!r}."
        )
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, received {order!r}.")
    if not callable(rate):
        _check_rate(rate, "rate")
    elif isinstance(rate, Hashable):
        _check_schedule(rate)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, received {epsilon}.")


@functools.lru_cache(maxsize=64)
def _check_schedule(rate: Callable[[jax.Array], Any]) -> None:
    """Checks a schedule's values at some counts, since its result under tracing has no value."""
    with jax.ensure_compile_time_eval():
        for count in (0, 1, 1000, 1_000_000):
            _check_rate(rate(jnp.float32(count)), f"rate, a schedule, at count {count},")


def _check_rate(value: Any, name: str) -> None:
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    )
    if not is_number:
        raise TypeError(
            f"{name} must be one number from 0 to 1, or a schedule that returns one, received "
            f"{value!r}."
        )
    if not isinstance(value, Tracer) and not 0 <= float(value) <= 1:
        raise ValueError(
            f"{name} must be from 0 to 1, received {value}. The rate is the weight of the new "
            "statistics, which is 1 - momentum: for Flax's momentum=0.9 pass rate=0.1."
        )
