"""Random crops and flips match slow versions, random resized crops match torchvision's."""

import itertools
import math
import random

import numpy as np
import pytest
from encoded_images import smooth_image
from PIL import Image

from wsbcn_flax.data import RandomCrop, RandomFlip, RandomResizedCrop

SIZES = [(375, 500), (500, 333), (224, 224), (60, 400)]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 8)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crops_and_flips_equal_slow_ones(shape, channels, dtype, padding):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, *shape, channels)).astype(dtype)
    before = images.copy()
    cropped = RandomCrop(padding=padding).random_map({"image": images}, np.random.default_rng(1))
    flipped = RandomFlip().random_map(cropped, np.random.default_rng(2))["image"]
    corners = np.random.default_rng(1).integers(0, 2 * padding, size=(64, 2), endpoint=True)
    flips = np.random.default_rng(2).integers(0, 2, size=64)
    for image, (top, left), flip, result in zip(images, corners, flips, flipped, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        crop = padded[top : top + shape[0], left : left + shape[1]]
        np.testing.assert_array_equal(result, np.fliplr(crop) if flip else crop)
    assert flipped.dtype == dtype
    np.testing.assert_array_equal(images, before)


def test_one_example_is_a_batch_without_the_first_axis():
    example = {"image": smooth_image(6, 5), "label": 3}
    batch = {"image": example["image"][np.newaxis], "label": 3}
    for transform, seed in itertools.product((RandomCrop(padding=2), RandomFlip()), range(8)):
        one, other = (
            transform.random_map(element, np.random.default_rng(seed))
            for element in (example, batch)
        )
        np.testing.assert_array_equal(one["image"], other["image"][0])
        assert one["label"] == 3


def test_every_choice_is_as_frequent():
    image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1)
    element = {"image": np.tile(image, (18_000, 1, 1, 1))}
    rng = np.random.default_rng(0)
    for transform in (RandomCrop(padding=1), RandomFlip()):
        element = transform.random_map(element, rng)
    _, counts = np.unique(element["image"], axis=0, return_counts=True)
    # There are 18 outcomes, each expected 1,000 times with standard deviation 31.
    assert len(counts) == 18
    assert np.abs(counts - 1000).max() < 5 * 31


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(padding=-1), r"padding .* >= 0, received -1"),
        (lambda: RandomResizedCrop(image_size=0), "image_size must be a positive .* received 0"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def boxes(height, width, count, seed=0):
    """``[count, 4]``: top, left, height and width of random crops."""
    rng = np.random.default_rng(seed)
    return np.array([RandomResizedCrop().box(height, width, rng) for _ in range(count)])


def torchvision_box(height, width, rng):
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crops_lie_in_the_image_and_keep_the_bounds(height, width):
    top, left, h, w = boxes(height, width, 3000).T
    assert min(top.min(), left.min()) >= 0
    assert (top + h).max() <= height
    assert (left + w).max() <= width
    share, ratio = h * w / (height * width), w / h
    # Sides are rounded to whole pixels, which changes areas and ratios.
    slack = 1 / h.min() + 1 / w.min()
    assert share.min() >= 0.08 * (1 - slack)
    assert share.max() <= 1
    assert ratio.min() >= 3 / 4 * (1 - slack)
    assert ratio.max() <= 4 / 3 * (1 + slack)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crops_are_distributed_as_torchvisions(height, width):
    """A Kolmogorov-Smirnov test of two samples of 4,000 crops."""
    count = 4000
    rng = random.Random(1)
    expected = np.array([torchvision_box(height, width, rng) for _ in range(count)])
    ours = boxes(height, width, count)
    # The probability of a larger gap is 1e-5 for each quantity.
    bound = math.sqrt(-math.log(1e-5 / 2) / 2) * math.sqrt(2 / count)
    for quantity in (*range(4), "area", "ratio", "center"):
        one, other = (measure(sample, quantity) for sample in (ours, expected))
        points = np.unique(np.concatenate([one, other]))
        gaps = [np.searchsorted(np.sort(s), points, side="right") / count for s in (one, other)]
        assert np.abs(gaps[0] - gaps[1]).max() < bound, quantity


def measure(sample, quantity):
    top, left, h, w = sample.T
    derived = {"area": h * w, "ratio": w / h, "center": 2 * top + h + 2 * left + w}
    return derived[quantity] if quantity in derived else sample[:, quantity]


@pytest.mark.parametrize(
    ("size", "box"),
    [((10, 1000), (0, 494, 10, 13)), ((1000, 9), (494, 0, 12, 9)), ((1, 1), (0, 0, 1, 1))],
)
def test_an_image_no_crop_fits_into_gives_its_middle(size, box):
    assert {tuple(each) for each in boxes(*size, 50)} == {box}


def test_a_crop_holds_the_pixels_of_its_box():
    pixels = smooth_image(120, 160)
    crop = RandomResizedCrop(image_size=48)
    for seed in range(20):
        top, left, h, w = crop.box(120, 160, np.random.default_rng(seed))
        result = crop.random_map({"image": pixels}, np.random.default_rng(seed))["image"]
        part = Image.fromarray(pixels[top : top + h, left : left + w])
        expected = np.asarray(part.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(result - expected).mean() < 1
