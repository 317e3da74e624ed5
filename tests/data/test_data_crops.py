"""Random-resized crops against a slow version of torchvision's, central crops against Pillow."""

import math
import random

import numpy as np
import pytest
from encoded_images import encode, smooth_image
from PIL import Image

from wsbcn_flax.data import eval_crop
from wsbcn_flax.data._crops import CentralCrop, RandomResizedCrop

CROP = RandomResizedCrop(image_size=16)
SIZES = [(375, 500), (500, 333), (224, 224), (60, 400)]


def boxes(height, width, count, seed=0):
    """``[count, 4]``: top, left, height and width of random crops."""
    draws = CROP.draw(np.random.default_rng(seed), count)
    return np.array([CROP.box(draw, height, width) for draw in draws])


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
    # Sides are rounded to whole pixels, areas and ratios follow.
    slack = 1 / h.min() + 1 / w.min()
    assert share.min() >= 0.08 * (1 - slack)
    assert share.max() <= 1
    assert ratio.min() >= 3 / 4 * (1 - slack)
    assert ratio.max() <= 4 / 3 * (1 + slack)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crops_are_distributed_as_torchvisions(height, width):
    """Two samples of 4,000: the largest gap between distributions, by Kolmogorov and Smirnov."""
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


def test_half_of_the_crops_are_mirrored():
    draws = CROP.draw(np.random.default_rng(0), 2000)
    ramp = np.repeat(np.arange(0, 250, 5, dtype=np.uint8)[np.newaxis, :, np.newaxis], 50, axis=0)
    ramp = np.repeat(ramp, 3, axis=2)
    mirrored = [crop[0, 0, 0] > crop[0, -1, 0] for crop in (CROP.apply(ramp, d) for d in draws)]
    # Standard deviation 22.
    assert abs(sum(mirrored) - 1000) < 5 * 22


def test_a_crop_holds_the_pixels_of_its_box():
    pixels = smooth_image(120, 160)
    crop = RandomResizedCrop(image_size=48)
    for draw in crop.draw(np.random.default_rng(3), 20):
        top, left, h, w = crop.box(draw, 120, 160)
        part = Image.fromarray(pixels[top : top + h, left : left + w])
        expected = np.asarray(part.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
        expected = expected[:, ::-1] if draw[-1] < 0.5 else expected
        assert np.abs(crop.apply(pixels, draw) - expected).mean() < 1


def pillow_crop(pixels, image_size, resize, shift=0):
    """torchvision's Resize and CenterCrop, by Pillow; the crop perhaps off by some pixels."""
    height, width = pixels.shape[:2]
    if height <= width:
        size = (int(resize * width / height), resize)
    else:
        size = (resize, int(resize * height / width))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - image_size) / 2.0) + shift for side in size)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size))).astype(int)


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 375), (300, 300), (256, 256), (90, 150), (257, 640), (331, 256)]
)
def test_central_crops_are_pillows(size):
    pixels = smooth_image(*size)
    crop = CentralCrop(image_size=224, resize=256).apply(pixels).astype(int)
    assert crop.shape == (224, 224, 3)
    difference = np.abs(crop - pillow_crop(pixels, 224, 256))
    assert difference.mean() < 1
    assert difference.max() <= 4
    # A crop one pixel off is another one.
    assert np.abs(crop - pillow_crop(pixels, 224, 256, shift=1)).mean() > 2 * difference.mean()


def test_an_image_of_the_right_size_is_left_as_it_is():
    pixels = smooth_image(32, 32)
    np.testing.assert_array_equal(CentralCrop(image_size=32, resize=32).apply(pixels), pixels)


def test_eval_crop_decodes_and_crops():
    pixels = smooth_image(60, 80)
    np.testing.assert_array_equal(
        eval_crop(encode(pixels), image_size=28, resize=32),
        CentralCrop(image_size=28, resize=32).apply(pixels),
    )
    with pytest.raises(ValueError, match=r"^cat\.jpg must be a whole JPEG"):
        eval_crop(b"no image", name="cat.jpg")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(image_size=0), "image_size must be a positive .* received 0"),
        (lambda: CentralCrop(image_size=0, resize=8), "image_size must be a positive"),
        (lambda: CentralCrop(image_size=32, resize=31), "at least image_size=32.* received 31"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
