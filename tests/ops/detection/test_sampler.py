"""Sampling: exact counts, no repetition, equal probabilities, keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsbcn_flax.ops.detection import sample_matches

sample = jax.jit(sample_matches, static_argnames=("size", "max_positives"))


def flags(positives, negatives, count=60):
    order = np.random.default_rng(0).permutation(count)
    return np.isin(np.arange(count), order[:positives]), np.isin(
        np.arange(count), order[positives : positives + negatives]
    )


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        (20, 40, (4, 12)),  # There are many of both.
        (3, 40, (3, 13)),  # Negatives fill the slots that positives leave.
        (20, 5, (4, 5)),  # Positives do not fill the slots that negatives leave.
        (4, 12, (4, 12)),
        (0, 40, (0, 16)),
        (20, 0, (4, 0)),
        (0, 0, (0, 0)),
    ],
)
def test_counts_are_exact(positives, negatives, expected):
    positive, negative = flags(positives, negatives)
    drawn = sample(jax.random.key(1), positive, negative, size=16, max_positives=4)
    index, is_positive, valid = (np.asarray(x) for x in drawn)
    assert (is_positive.sum(), (valid & ~is_positive).sum()) == expected
    assert positive[index[is_positive]].all()
    assert negative[index[valid & ~is_positive]].all()
    assert len(set(index[valid])) == valid.sum()
    assert not is_positive[4:].any()
    assert (np.diff(valid.astype(int)) <= 0).all()  # Empty slots come last.
    assert (index[~valid] == 0).all()


def test_more_slots_than_references():
    positive, negative = flags(1, 2, count=3)
    drawn = sample(jax.random.key(1), positive, negative, size=8, max_positives=8)
    assert drawn.index.shape == (8,)
    assert drawn.valid.tolist() == [True] * 3 + [False] * 5
    assert drawn.positive.tolist() == [True] + [False] * 7


def test_every_reference_has_the_same_chance():
    positive, negative = flags(10, 50)
    draw = functools.partial(sample_matches, size=20, max_positives=5)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(draw, (0, None, None)))(keys, positive, negative)
    counts = np.bincount(np.asarray(drawn.index).ravel(), minlength=60) / len(keys)
    # In 4,000 draws of 5 of 10 positives and 15 of 50 negatives, within 5 standard deviations.
    assert abs(counts[positive] - 5 / 10).max() < 5 * np.sqrt(0.25 / 4000)
    assert abs(counts[negative] - 15 / 50).max() < 5 * np.sqrt(0.21 / 4000)


def test_the_key_decides():
    positive, negative = flags(20, 40)
    one, same, other = (
        sample(jax.random.key(seed), positive, negative, size=16, max_positives=4).index
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_an_image_is_sampled_as_if_alone():
    positive, negative = flags(20, 40)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(3))
    draw = functools.partial(sample, size=16, max_positives=4)
    mapped = jax.vmap(draw)(keys, np.tile(positive, (3, 1)), np.tile(negative, (3, 1)))
    np.testing.assert_array_equal(mapped.index[1], draw(keys[1], positive, negative).index)


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match=r"received shapes \(2,\) and \(3,\)"):
        sample_matches(
            jax.random.key(0), jnp.ones(2, bool), jnp.ones(3, bool), size=2, max_positives=1
        )
    with pytest.raises(ValueError, match="from 0 to 2, received 3"):
        sample_matches(
            jax.random.key(0), jnp.ones(2, bool), jnp.ones(2, bool), size=2, max_positives=3
        )
