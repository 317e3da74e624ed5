"""How times are taken: interleaved, and compared as ratios within a round."""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TypeVar

import jax
import numpy as np

Pass = Literal["forward", "forward_backward"]
Key = tuple[str, Pass]
Call = Callable[[], Any]
KeyT = TypeVar("KeyT", bound=Hashable)

PASSES: tuple[Pass, ...] = ("forward", "forward_backward")


def interleaved_seconds(
    calls: Mapping[KeyT, Call],
    *,
    rounds: int,
    on_warm: Callable[[], object] = lambda: None,
    on_round: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[KeyT, np.ndarray]:
    """Times every call once per round, so that what disturbs the machine disturbs them all alike.

    Each call is first compiled and run once more. The order changes from round to round, see
    ``balanced_order``, and a call's time ends when all of its results are there.

    Args:
        calls: the functions of no arguments to compare.
        rounds: how often each is timed.
        on_warm: is called after each call's compilation.
        on_round: is called after each round, outside of any measurement.
        clock: gives the time in seconds.

    Returns:
        The seconds of every call, [rounds].
    """
    for call in calls.values():
        for _ in range(2):
            jax.block_until_ready(call())
        on_warm()

    seconds = {key: np.empty(rounds) for key in calls}
    keys = list(calls)
    for index in range(rounds):
        for key in (keys[position] for position in balanced_order(len(keys), index)):
            begin = clock()
            result = jax.block_until_ready(calls[key]())
            seconds[key][index] = clock() - begin
            del result  # Freed here, outside of the time taken.
        on_round()
    return seconds


def balanced_order(count: int, index: int) -> list[int]:
    """The order in which to time ``count`` calls in round ``index``: rotations of a zigzag.

    Who runs before a call changes its time, by the caches and the memory it leaves behind: a tenth
    and more here. In ``count`` rounds (twice as many if that is odd) every call stands at every
    place equally often, and follows every other equally often.

    Example:
        >>> [balanced_order(4, index) for index in range(4)]
        [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]

    References:
        Williams, Experimental designs balanced for the estimation of residual effects of
        treatments, 1949.
    """
    zigzag = ((step + 1) // 2 * (1 if step % 2 else -1) for step in range(count))
    direction = -1 if index // count % 2 else 1
    return [(index + direction * offset) % count for offset in zigzag]


def ratio(seconds: np.ndarray, reference: np.ndarray) -> float:
    """The median over rounds of one call's time over another's in the same round."""
    return float(np.median(seconds / reference))


def geometric_mean_ratio(
    measured: list[dict[Key, np.ndarray]], name: str, reference: str, which: Pass
) -> float:
    """The geometric mean, over shapes, of ``ratio`` between two layers in one pass."""
    logs = [math.log(ratio(each[name, which], each[reference, which])) for each in measured]
    return math.exp(sum(logs) / len(logs))


def median_and_spread(seconds: np.ndarray) -> dict[str, float]:
    """The median in milliseconds, and the interquartile range as a fraction of the median."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return {"median_ms": float(median) * 1e3, "spread": float((high - low) / median)}
