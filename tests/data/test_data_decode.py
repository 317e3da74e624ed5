"""Image files to pixels: every kind of file in ImageNet, sizes, and files that are no images."""

import io
import sys

import numpy as np
import pytest
from encoded_images import encode, smooth_image
from PIL import Image

from wsbcn_flax.data._decode import decode_rgb, import_cv2, resize

PIXELS = smooth_image(30, 44)


def test_png_is_exact_and_red_comes_first():
    decoded = decode_rgb(encode(PIXELS), name="x")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, PIXELS)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_jpeg_is_what_pillow_reads(options):
    content = encode(PIXELS, "JPEG", quality=90, **options)
    decoded = decode_rgb(content, name="x").astype(int)
    assert np.abs(decoded - PIXELS).mean() < 4
    with Image.open(io.BytesIO(content)) as image:
        assert np.abs(decoded - np.asarray(image)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind):
    decoded = decode_rgb(encode(PIXELS[..., 0], kind), name="x")
    assert decoded.shape == PIXELS.shape
    assert (decoded == decoded[..., :1]).all()
    assert np.abs(decoded.astype(int) - PIXELS[..., :1]).mean() < 4


def test_cmyk_and_palettes_become_rgb():
    image = Image.fromarray(PIXELS)
    for content in (encode(image.convert("CMYK"), "JPEG"), encode(image.quantize(256), "PNG")):
        decoded = decode_rgb(content, name="x")
        assert decoded.shape == PIXELS.shape
        assert np.abs(decoded.astype(int) - PIXELS).mean() < 12


def test_the_orientation_of_the_camera_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    rotated = encode(Image.fromarray(PIXELS), "JPEG", exif=exif)
    plain = encode(Image.fromarray(PIXELS), "JPEG")
    np.testing.assert_array_equal(decode_rgb(rotated, name="x"), decode_rgb(plain, name="x"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_a_part_of_an_image_is_none(kind, share):
    content = encode(PIXELS, kind)
    part = content[: int(share * len(content))]
    with pytest.raises(ValueError, match=rf"^record 7 must be .* received {len(part)} bytes"):
        decode_rgb(part, name="record 7")


def test_text_is_no_image():
    with pytest.raises(ValueError, match="whole JPEG or PNG image, received 9 bytes"):
        decode_rgb(b"not found", name="x")


@pytest.mark.parametrize("size", [(15, 22), (12, 40), (29, 43)])
def test_shrinking_averages_areas(size):
    """The exact average over the area of each new pixel."""
    exact = PIXELS.astype(float)
    for axis, new in enumerate(size):
        exact = np.apply_along_axis(average_intervals, axis, exact, new)
    assert np.abs(resize(PIXELS, *size) - exact).max() <= 1


def average_intervals(values, count):
    """The averages of a step function over equal intervals, by its integral."""
    integral = np.concatenate([[0], values.cumsum()])
    ends = np.linspace(0, len(values), count + 1)
    return np.diff(np.interp(ends, range(len(integral)), integral)) * count / len(values)


@pytest.mark.parametrize("size", [(60, 88), (45, 50), (20, 90)])
def test_growing_interpolates(size):
    image = Image.fromarray(PIXELS).resize(size[::-1], Image.Resampling.BILINEAR)
    difference = resize(PIXELS, *size).astype(int) - np.asarray(image)
    assert resize(PIXELS, *size).shape == (*size, 3)
    assert np.abs(difference).mean() < 1


def test_missing_opencv_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    import_cv2.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'wsbcn_flax\[jpeg\]'"):
        decode_rgb(encode(PIXELS), name="x")
