"""Decoding of image files: every kind of file in ImageNet, sizes, files that are not images."""

import io
import sys

import numpy as np
import pytest
from encoded_images import encode, smooth_image
from PIL import Image

from wsbcn_flax.data import CentralCrop, DecodeImage
from wsbcn_flax.data._decoding import import_cv2, resize

PIXELS = smooth_image(30, 44)


def decode(content, **entries):
    return DecodeImage().map({"image": content, **entries})["image"]


def test_png_is_exact_and_red_comes_first():
    decoded = decode(encode(PIXELS))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, PIXELS)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_jpeg_is_what_pillow_reads(options):
    content = encode(PIXELS, "JPEG", quality=90, **options)
    decoded = decode(content).astype(int)
    assert np.abs(decoded - PIXELS).mean() < 4
    with Image.open(io.BytesIO(content)) as image:
        assert np.abs(decoded - np.asarray(image)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind):
    decoded = decode(encode(PIXELS[..., 0], kind))
    assert decoded.shape == PIXELS.shape
    assert (decoded == decoded[..., :1]).all()
    assert np.abs(decoded.astype(int) - PIXELS[..., :1]).mean() < 4


def test_cmyk_and_palettes_become_rgb():
    image = Image.fromarray(PIXELS)
    for content in (encode(image.convert("CMYK"), "JPEG"), encode(image.quantize(256), "PNG")):
        decoded = decode(content)
        assert decoded.shape == PIXELS.shape
        assert np.abs(decoded.astype(int) - PIXELS).mean() < 12


def test_an_image_is_turned_as_its_camera_noted_unless_told_otherwise():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    rotated = encode(Image.fromarray(PIXELS), "JPEG", exif=exif)
    plain = decode(encode(Image.fromarray(PIXELS), "JPEG"))
    np.testing.assert_array_equal(decode(rotated), np.rot90(plain, -1))
    as_stored = DecodeImage(upright=False).map({"image": rotated})["image"]
    np.testing.assert_array_equal(as_stored, plain)


def test_16_bits_are_scaled_to_8():
    deep = encode(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257))
    np.testing.assert_array_equal(decode(deep), decode(encode(PIXELS[..., 0])))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_laid_on_white(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    opaque = np.asarray(image.convert("RGB"))
    alpha = np.full((30, 44), 255, np.uint8)
    alpha[:, :20] = 0
    image.putalpha(Image.fromarray(alpha))
    decoded = decode(encode(image))
    assert (decoded[:, :20] == 255).all()
    np.testing.assert_array_equal(decoded[:, 20:], opaque[:, 20:])


def test_too_many_pixels_are_refused_before_they_are_decoded():
    huge = encode(Image.new("1", (10_000, 10_000)))
    with pytest.raises(ValueError, match=r"^big\.png must have at most 67,108,864 pixels"):
        decode(huge, file_name="big.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_a_part_of_an_image_is_none(kind, share):
    content = encode(PIXELS, kind)
    part = content[: int(share * len(content))]
    with pytest.raises(ValueError, match=rf"^cat\.jpg must be .* received {len(part)} bytes"):
        decode(part, file_name="cat.jpg")


def test_the_other_entries_stay_and_the_file_name_goes():
    element = {"image": encode(PIXELS), "label": 3, "file_name": b"cat.png"}
    assert DecodeImage().map(element).keys() == {"image", "label"}
    assert "file_name" in element


def test_text_is_no_image():
    with pytest.raises(
        ValueError, match="the image must be a whole JPEG or PNG image, received 9 bytes"
    ):
        decode(b"not found")


@pytest.mark.parametrize("size", [(15, 22), (12, 40), (29, 43)])
def test_shrinking_averages_areas(size):
    """The exact average over the area of each new pixel."""
    exact = PIXELS.astype(float)
    for axis, new in enumerate(size):
        exact = np.apply_along_axis(average_intervals, axis, exact, new)
    assert np.abs(resize(PIXELS, *size) - exact).max() <= 1


def average_intervals(values, count):
    """Averages a step function over equal intervals, by its integral."""
    integral = np.concatenate([[0], values.cumsum()])
    ends = np.linspace(0, len(values), count + 1)
    return np.diff(np.interp(ends, range(len(integral)), integral)) * count / len(values)


@pytest.mark.parametrize("size", [(60, 88), (45, 50), (20, 90)])
def test_growing_interpolates(size):
    image = Image.fromarray(PIXELS).resize(size[::-1], Image.Resampling.BILINEAR)
    difference = resize(PIXELS, *size).astype(int) - np.asarray(image)
    assert resize(PIXELS, *size).shape == (*size, 3)
    assert np.abs(difference).mean() < 1


def pillow_crop(pixels, image_size, resize, shift=0):
    """Applies torchvision's Resize and CenterCrop with Pillow; ``shift`` moves the crop."""
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
    crop = CentralCrop().map({"image": pixels})["image"].astype(int)
    assert crop.shape == (224, 224, 3)
    difference = np.abs(crop - pillow_crop(pixels, 224, 256))
    assert difference.mean() < 1
    assert difference.max() <= 4
    # A negative control: a crop that is one pixel off differs more.
    assert np.abs(crop - pillow_crop(pixels, 224, 256, shift=1)).mean() > 2 * difference.mean()


def test_an_image_of_the_right_size_is_left_as_it_is():
    pixels = smooth_image(32, 32)
    crop = CentralCrop(image_size=32, resize=32).map({"image": pixels, "label": 1})
    np.testing.assert_array_equal(crop["image"], pixels)
    assert crop["label"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0, "resize": 8}, "image_size must be positive .* received 0 and 8"),
        ({"image_size": 32, "resize": 31}, "resize at least as large.* received 32 and 31"),
    ],
)
def test_central_crop_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        CentralCrop(**options)


def test_missing_opencv_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    import_cv2.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'wsbcn_flax\[jpeg\]'"):
        decode(encode(PIXELS))
