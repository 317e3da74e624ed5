"""Channel statistics and normalization against numpy in float64."""

import numpy as np
import pytest

from wsbcn_flax.data import Normalize, channel_statistics


@pytest.fixture
def images():
    """More images than one chunk of the histogram holds, channels of different ranges."""
    rng = np.random.default_rng(0)
    return np.stack(
        [
            rng.integers(low, high, (2345, 3, 4), dtype=np.uint8)
            for low, high in ((0, 256), (40, 60))
        ],
        axis=-1,
    )


def test_statistics_match_float64(images):
    mean, std = channel_statistics(images)
    scaled = images.astype(np.float64) / 255
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, scaled.std(axis=(0, 1, 2)), rtol=1e-6)


def test_statistics_of_a_nearly_constant_channel():
    images = np.full((1000, 10, 10, 1), 255, np.uint8)
    images[0, 0, 0] = 254
    share = 1 / images.size
    expected = np.sqrt(share * (1 - share)) / 255
    np.testing.assert_allclose(channel_statistics(images).std, [expected], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.zeros((2, 3, 4, 1)), np.zeros((2, 3), np.uint8)])
def test_statistics_reject(bad):
    with pytest.raises(ValueError, match="images must be uint8"):
        channel_statistics(bad)


def test_normalizes_every_channel_by_its_own_constants(images):
    mean, std = channel_statistics(images)
    normalized = Normalize(mean, std).map({"image": images, "label": 1})["image"]
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, (images / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(normalized.mean(axis=(0, 1, 2), dtype=np.float64), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(axis=(0, 1, 2), dtype=np.float64), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [1.0], "must be one number for each of 2 channels, received 1"),
        ([0.5, 0.5], [1.0], "one for each channel"),
        ([0.5, np.nan], [1.0, 1.0], "mean and std must be finite"),
        ([0.5, 0.5], [1.0, 0.0], "and std positive;.*constant"),
    ],
)
def test_normalize_rejects(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std).map({"image": np.zeros((4, 4, 2), np.uint8)})


@pytest.mark.parametrize("mirror", [1, -1])
def test_one_example_is_normalized_as_in_a_batch(images, mirror):
    normalize, images = Normalize(*channel_statistics(images)), images[:, :, ::mirror]
    batch = normalize.map({"image": images})["image"]
    np.testing.assert_array_equal(normalize.map({"image": images[7]})["image"], batch[7])
