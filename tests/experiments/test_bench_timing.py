"""Times are taken in balanced orders, each call alone."""

import collections
import itertools

import numpy as np
import pytest

from experiments._bench import timing as bench


@pytest.mark.parametrize(("count", "rounds"), [(2, 2), (5, 10), (12, 12), (1, 3)])
def test_orders_balance_places_and_predecessors(count, rounds):
    orders = [bench.balanced_order(count, index) for index in range(rounds)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = collections.Counter(pair for order in orders for pair in enumerate(order))
    pairs = collections.Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(set(places.values())) == 1
    assert len(places) == count * count
    assert len(set(pairs.values())) <= 1
    assert len(pairs) == count * (count - 1)


def test_every_call_is_timed_alone_and_warmed_up_before():
    now, ran, rounds_seen, warmed = 0.0, [], [], []

    def work(key, seconds):
        nonlocal now
        now += seconds
        ran.append(key)

    durations = {("a", "forward"): 1.0, ("b", "forward"): 2.0, ("c", "forward"): 4.0}
    calls = {key: lambda key=key, s=s: work(key, s) for key, s in durations.items()}
    seconds = bench.interleaved_seconds(
        calls,
        rounds=6,
        on_warm=lambda: warmed.append(len(ran)),
        on_round=lambda: rounds_seen.append(len(ran)),
        clock=lambda: now,
    )
    assert warmed == [2, 4, 6]
    for key, duration in durations.items():
        np.testing.assert_array_equal(seconds[key], np.full(6, duration))
    assert rounds_seen == [6 + 3 * (index + 1) for index in range(6)]
    assert set(ran[:6]) == set(durations)
