"""Stratified splits: exact size, fair shares, and the same for good."""

import zlib

import numpy as np
import pytest

from wsbcn_flax.data._stratify import stratified_split


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("test_size", [1, 7, 50, 199])
def test_shares_are_within_one_and_the_size_exact(seed, test_size):
    labels = np.random.default_rng(seed).choice(4, 200, p=[0.5, 0.3, 0.15, 0.05])
    train, test = stratified_split(labels, test_size=test_size, seed=seed)
    assert len(test) == test_size
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(200))
    shares = np.bincount(labels, minlength=4) * test_size / 200
    assert np.abs(np.bincount(labels[test], minlength=4) - shares).max() < 1


def test_the_seed_alone_decides():
    labels = np.arange(100) % 5
    _, first = stratified_split(labels, test_size=20, seed=1)
    _, again = stratified_split(labels, test_size=20, seed=1)
    _, other = stratified_split(labels, test_size=20, seed=2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_stays_the_same_across_releases():
    """A change here is a change of the data sets: their builders need a new version."""
    _, test = stratified_split(np.arange(1797) % 10, test_size=360, seed=0)
    assert zlib.crc32(test.astype("<i8").tobytes()) == 2894120865


@pytest.mark.parametrize("test_size", [0, 10, -1])
def test_rejects_an_empty_split(test_size):
    with pytest.raises(ValueError, match=f"1 to 9, got {test_size}"):
        stratified_split(np.zeros(10, int), test_size=test_size, seed=0)
