"""The vectorized augmentation against a slow one that goes image by image."""

import itertools

import numpy as np
import pytest

from wsbcn_flax.data import Augment


def augment_slowly(images: np.ndarray, draws: np.ndarray, padding: int) -> np.ndarray:
    _, height, width, _ = images.shape
    results = []
    for image, (top, left, flip) in zip(images, draws, strict=True):
        padded = np.zeros((height + 2 * padding, width + 2 * padding, image.shape[-1]), image.dtype)
        padded[padding : padding + height, padding : padding + width] = image
        crop = padded[top : top + height, left : left + width]
        results.append(np.fliplr(crop) if flip else crop)
    return np.stack(results)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 8)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_equals_the_slow_reference(shape, channels, padding, flip):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, *shape, channels), dtype=np.uint8)
    before = images.copy()
    augment = Augment(crop_padding=padding, horizontal_flip=flip)
    draws = augment.draw(rng, len(images))
    augmented = augment.apply(images, draws)
    assert augmented.dtype == np.uint8
    np.testing.assert_array_equal(augmented, augment_slowly(images, draws, padding))
    np.testing.assert_array_equal(images, before)


def test_draws_cover_every_choice_evenly():
    augment = Augment(crop_padding=1, horizontal_flip=True)
    draws = augment.draw(np.random.default_rng(0), 18_000)
    choices, counts = np.unique(draws, axis=0, return_counts=True)
    expected = list(itertools.product((0, 1, 2), (0, 1, 2), (0, 1)))
    assert [tuple(choice) for choice in choices] == expected
    # 18 choices of 1,000 each, standard deviation 31.
    assert np.abs(counts - 1000).max() < 5 * 31


def test_never_flips_unless_asked():
    draws = Augment(crop_padding=4).draw(np.random.default_rng(0), 1000)
    assert draws[:, 2].max() == 0


def test_call_draws_then_applies():
    images = np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5, 1)
    augment = Augment(crop_padding=2, horizontal_flip=True)
    draws = augment.draw(np.random.default_rng(7), 4)
    np.testing.assert_array_equal(
        augment(images, np.random.default_rng(7)), augment.apply(images, draws)
    )


def test_rejects_negative_padding():
    with pytest.raises(ValueError, match=r"crop_padding .* >= 0, got -1"):
        Augment(crop_padding=-1)
