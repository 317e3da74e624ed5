"""Transforms of images with boxes and masks, compared with pycocotools and painted images."""

import itertools

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from coco_files import polygon
from encoded_images import encode

from wsbcn_flax.data import (
    CAFFE_BGR_STATISTICS,
    DecodeAnnotatedImage,
    Normalize,
    PadBoxes,
    PadImage,
    RandomFlipObjects,
    RasterizeMasks,
    ResizeShorter,
    ToBGR,
    encode_rle,
)
from wsbcn_flax.data._coco import _compact
from wsbcn_flax.ops.detection import paste_mask


def rasterize(box, segmentation, size):
    element = {"boxes": np.float32([box]), "segmentations": (_compact(segmentation),)}
    return RasterizeMasks(size=size).map(element)["masks"][0]


def oracle(segmentation, height, width):
    """Returns the pixels of an image that polygons cover, by pycocotools."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


@pytest.mark.parametrize("beyond", [0, 20])
@pytest.mark.parametrize("seed", range(3))
def test_polygons_are_drawn_as_pycocotools_draws_the_enlarged_image(seed, beyond):
    """A mask of side 112 over a box of side 28 is a crop of the image enlarged four times."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 100, 2) / 4
    parts = [
        (rng.integers(-beyond, 112 + beyond, (points, 2)) / 4 + (x, y)).ravel() for points in (3, 7)
    ]
    whole = oracle([(4 * part).tolist() for part in parts], 400, 400)
    left, top = int(4 * x), int(4 * y)
    expected = whole[top : top + 112, left : left + 112]
    assert 0.05 < expected.mean() < 0.95
    mask = rasterize([x, y, x + 28, y + 28], [part.tolist() for part in parts], 112)
    assert mask.dtype == np.uint8
    # pycocotools rounds negative coordinates, outside the box, the other way.
    assert (mask != expected).mean() <= (2e-3 if beyond else 0)


@pytest.mark.parametrize("compressed", [True, False])
def test_rles_are_sampled_at_the_centres_of_cells(compressed):
    whole = np.random.default_rng(0).integers(0, 2, (30, 50)).astype(np.uint8)
    rle = encode_rle(whole)
    if not compressed:
        runs = np.flatnonzero(np.diff(np.r_[0, whole.ravel("F")])).tolist()
        edges = [0, *runs, whole.size] if not whole[0, 0] else [0, 0, *runs[1:], whole.size]
        rle = {"size": [30, 50], "counts": np.diff(edges).tolist()}
        np.testing.assert_array_equal(coco_mask.decode(coco_mask.frPyObjects(rle, 30, 50)), whole)
    crop = whole[4:20, 34:50]
    np.testing.assert_array_equal(rasterize([34, 4, 50, 20], rle, 16), crop)
    np.testing.assert_array_equal(
        rasterize([34, 4, 50, 20], rle, 48), np.kron(crop, np.ones((3, 3)))
    )
    np.testing.assert_array_equal(rasterize([34.4, 4.3, 50, 20], rle, 8)[0], whole[5, 35::2])


def test_a_damaged_rle_is_an_error():
    with pytest.raises(ValueError, match="Invalid RLE"):
        rasterize([0, 0, 4, 4], {"size": [40, 60], "counts": "abc"}, 4)


@pytest.mark.parametrize(
    "box",
    [(5, 6, 30, 20), (2.7, 3.2, 8.1, 39.9), (-3, 0, 60, 45), (50.5, 30, 59.9, 39.5), (7, 7, 7, 7)],
)
def test_pasting_interpolates_at_the_centres_of_pixels(box):
    """The oracle interpolates each pixel from its four nearest cells, with zeros outside."""
    mask = np.random.default_rng(0).random((28, 28))
    padded, expected = np.pad(mask, 3), np.zeros((40, 60))
    x1, y1, x2, y2 = box
    for y, x in itertools.product(range(40), range(60)):
        if not (x1 - 1 < x < x2 + 1 and y1 - 1 < y < y2 + 1 and x1 < x2):
            continue
        i = np.clip((y + 0.5 - y1) / (y2 - y1) * 28 - 0.5 + 3, 0, 32)
        j = np.clip((x + 0.5 - x1) / (x2 - x1) * 28 - 0.5 + 3, 0, 32)
        corner = padded[int(i) : int(i) + 2, int(j) : int(j) + 2]
        expected[y, x] = np.array([1 - i % 1, i % 1]) @ corner @ np.array([1 - j % 1, j % 1])
    pasted = paste_mask(mask, np.array(box), (40, 60), rounded=False)
    assert (pasted.dtype, pasted.shape) == (bool, (40, 60))
    clear = abs(expected - 0.5) > 1e-6
    np.testing.assert_array_equal(pasted[clear], (expected > 0.5)[clear])


@pytest.mark.parametrize("kind", [3, 17, 90])
def test_pasting_undoes_rasterizing(kind):
    """Masks agree within a pixel at the edges, by pycocotools' IoU."""
    segmentation = polygon(kind, 20.0, 30.0, 100.0, 80.0)
    mask = rasterize([20, 30, 120, 110], segmentation, 112)
    soft = mask.reshape(28, 4, 28, 4).mean(axis=(1, 3))
    pasted = encode_rle(paste_mask(soft, np.array([20, 30, 120, 110]), (160, 150), rounded=False))
    expected = encode_rle(oracle(segmentation, 160, 150))
    assert coco_mask.iou([pasted], [expected], [0]).item() > 0.95
    assert int(coco_mask.area(pasted)) == pytest.approx(int(coco_mask.area(expected)), rel=0.02)


@pytest.mark.parametrize("kind", [17, 90])
@pytest.mark.parametrize("shape", [(90, 140), (140, 90), (50, 60)])
def test_boxes_and_masks_stay_with_the_objects_of_the_image(kind, shape):
    """After every transform, the pasted mask of a painted object is where the paint is."""
    height, width = shape
    segmentation = polygon(kind, 4.0, 6.0, 40.0, 36.0)
    paint = oracle(segmentation, height, width)
    element = {
        "image": encode(np.repeat(255 * paint[..., np.newaxis], 3, axis=2)),
        "height": height,
        "width": width,
        "boxes": np.float32([[4, 6, 44, 42]]),
        "labels": np.int32([kind]),
        "segmentations": (_compact(segmentation),),
    }
    transforms = (
        RasterizeMasks(),
        DecodeAnnotatedImage(),
        ResizeShorter(shorter=100, longer=150),
        RandomFlipObjects(),
        PadImage(buckets=((100, 160), (160, 100))),
        PadBoxes(slots=2),
    )
    sides = set()
    for seed in range(4):
        found = dict(element)
        for transform in transforms:
            rng = np.random.default_rng(seed)
            random = hasattr(transform, "random_map")
            found = transform.random_map(found, rng) if random else transform.map(found)
        assert found.keys() == {"image", "image_hw", "boxes", "labels", "valid", "masks"}
        h, w = found["image_hw"]
        assert min(h, w) == 100 or max(h, w) == 150
        assert not found["image"][h:].any()
        assert not found["image"][:, w:].any()
        np.testing.assert_array_equal(found["valid"], [True, False])
        np.testing.assert_array_equal(found["labels"], [kind, 0])
        assert not found["boxes"][1].any()
        assert not found["masks"][1].any()
        pasted = paste_mask(
            found["masks"][0], found["boxes"][0], found["image"].shape[:2], rounded=False
        )
        painted = found["image"][..., 0] > 127
        assert (pasted & painted).sum() / (pasted | painted).sum() > 0.93
        sides.add(bool(found["boxes"][0, 0] > w / 2 - 40))
    assert sides == {True, False}, "some seeds must flip and others must not"


def test_a_flip_twice_is_none():
    element = {
        "image": np.arange(24).reshape(2, 4, 3),
        "boxes": np.float32([[0, 1, 1.5, 2]]),
        "masks": np.arange(4).reshape(1, 2, 2),
    }
    flip = RandomFlipObjects()
    seed = next(s for s in range(9) if np.random.default_rng(s).random() >= 0.5)
    once = flip.random_map(element, np.random.default_rng(seed))
    np.testing.assert_array_equal(once["boxes"], [[2.5, 1, 4, 2]])
    np.testing.assert_array_equal(once["masks"], [[[1, 0], [3, 2]]])
    twice = flip.random_map(once, np.random.default_rng(seed))
    for key, value in element.items():
        np.testing.assert_array_equal(twice[key], value)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((375, 1242), (402, 1333)),
        ((1000, 1000), (800, 800)),
        ((1, 5000), (1, 1333)),
    ],
)
def test_sizes_of_the_published_detectors(size, expected):
    assert ResizeShorter().size(*size) == expected


def test_boxes_fill_the_resized_image_exactly():
    element = {"image": np.zeros((37, 53, 3), np.uint8), "boxes": np.float32([[0, 0, 53, 37]])}
    resized = ResizeShorter(shorter=50, longer=66).map(element)
    h, w, _ = resized["image"].shape
    assert (h, w) == (46, 66)
    np.testing.assert_allclose(resized["boxes"], [[0, 0, w, h]], rtol=1e-6)


def test_blue_first_minus_the_means():
    image = np.uint8([[[10, 20, 30]]])
    element = Normalize(*CAFFE_BGR_STATISTICS).map(ToBGR().map({"image": image}))
    expected = [[[30 - 102.9801, 20 - 115.9465, 10 - 122.7717]]]
    np.testing.assert_allclose(element["image"], expected, rtol=1e-5)


def test_images_without_objects_are_all_padding():
    element = {
        "boxes": np.zeros((0, 4), np.float32),
        "labels": np.zeros(0, np.int32),
        "segmentations": (),
    }
    padded = PadBoxes(slots=3).map(RasterizeMasks(size=8).map(element))
    assert {key: value.shape for key, value in padded.items()} == {
        "boxes": (3, 4),
        "labels": (3,),
        "masks": (3, 8, 8),
        "valid": (3,),
    }
    assert not any(value.any() for value in padded.values())


def test_rejects():
    boxes = {"id": 7, "boxes": np.zeros((4, 4)), "labels": np.zeros(4)}
    with pytest.raises(ValueError, match="image 7 has 4 objects for 3 slots; raise PadBoxes"):
        PadBoxes(slots=3).map(boxes)
    with pytest.raises(ValueError, match=r"900x900 .* one of the buckets 800x1344, 1344x800"):
        PadImage().map({"image": np.zeros((900, 900, 3))})
    with pytest.raises(ValueError, match="1 <= shorter <= longer, received 9 and 8"):
        ResizeShorter(shorter=9, longer=8)
    with pytest.raises(ValueError, match=r"size must be a positive .* received 0"):
        RasterizeMasks(size=0)
