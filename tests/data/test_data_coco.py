"""Annotation files in COCO's format, good ones and bad ones."""

import copy
import json

import numpy as np
import pytest
from coco_files import coco_content, write_coco
from encoded_images import encode, smooth_image

from wsbcn_flax.data import (
    DecodeAnnotatedImage,
    PadBoxes,
    PadImage,
    eval_batches,
    load_coco,
    train_batches,
)


def load(folder, content, **options):
    return load_coco(write_coco(folder, content), folder / "images", **options)


def add_annotation(content, **fields):
    """Adds an annotation to the first image: the first one with other fields."""
    new = {**copy.deepcopy(content["annotations"][0]), "id": 1000 + len(content["annotations"])}
    content["annotations"].append(new | fields)


def test_examples_are_what_the_file_says(tmp_path):
    content = coco_content()
    source = load(tmp_path, content)
    assert (len(source), source.name, source.skipped) == (6, "instances", {})
    assert source.class_names == ("background", "square", "triangle", "L")
    for index, image in enumerate(content["images"]):
        example = source[index]
        assert {key: example[key] for key in image} == image
        assert example["image"] == (tmp_path / "images" / image["file_name"]).read_bytes()
        objects = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        assert (example["boxes"].dtype, example["labels"].dtype) == (np.float32, np.int32)
        x, y, w, h = np.array([each["bbox"] for each in objects]).T
        np.testing.assert_array_equal(example["boxes"], np.stack([x, y, x + w, y + h], axis=1))
        labels = [{3: 1, 17: 2, 90: 3}[each["category_id"]] for each in objects]
        np.testing.assert_array_equal(example["labels"], labels)
        polygons = [[part.tolist() for part in each] for each in example["segmentations"]]
        assert polygons == [each["segmentation"] for each in objects]


def test_boxes_are_clipped_and_what_cannot_be_trained_on_is_counted(tmp_path):
    content = coco_content(3)
    rle = {"counts": [2400], "size": [40, 60]}
    add_annotation(content, bbox=[-5, 30, 15, 20])
    add_annotation(content, bbox=[50, 10, 500, 2], segmentation=rle)
    add_annotation(content, iscrowd=1, segmentation=rle)
    add_annotation(content, iscrowd=1)
    add_annotation(content, bbox=[5, 5, 0, 10])
    add_annotation(content, bbox=[60, 5, 10, 10])  # outside the image
    add_annotation(content, bbox=[5, 5, -3, 10])
    add_annotation(content, segmentation=[])
    add_annotation(content, segmentation=[[1, 2, 3, 4]])
    del content["annotations"][-1]["iscrowd"]
    for annotation in content["annotations"]:  # image 1 keeps nothing
        annotation["iscrowd"] = annotation.get("iscrowd", 0) or int(annotation["image_id"] == 11)
    source = load(tmp_path, content)
    assert source[0]["boxes"][1:].tolist() == [[0, 30, 10, 40], [50, 10, 60, 12]]
    assert [image.id for image in source.images] == [10, 12]
    assert source.skipped == {
        "crowds": 2 + 2,
        "empty boxes": 3,
        "objects without a mask": 2,
        "images without an object": 1,
    }
    boxes_only = load(tmp_path, content, masks=False, keep_empty=True)
    assert [len(image.boxes) for image in boxes_only.images] == [5, 0, 3]
    assert boxes_only.images[1].labels.shape == (0,)
    assert "segmentations" not in boxes_only[0]


BAD = {
    "no list": (lambda c: c.pop("images"), r"must hold a list 'images', received NoneType"),
    "no size": (
        lambda c: c["images"][1].pop("height"),
        r"entry 1 of 'images' must be .* without height",
    ),
    "flat": (lambda c: c["images"][1].update(width=0), r"1\.png', 60 and 0"),
    "text id": (lambda c: c["images"][0].update(id="a"), r"must be integers .* received 'a'"),
    "image twice": (lambda c: c["images"][1].update(id=10), r"'images' must be unique.*as 10"),
    "annotation twice": (
        lambda c: c["annotations"][1].update(id=100),
        r"ids in 'annotations' must be unique, received 1 more than once, such as 100",
    ),
    "category twice": (
        lambda c: c.update(categories=[{"id": 3, "name": "a"}] * 2),
        r"ids in 'categories' must be unique",
    ),
    "unknown category": (
        lambda c: c["annotations"][2].update(category_id=4),
        r"annotation 102: category_id must be in 'categories', received 4",
    ),
    "unknown image": (
        lambda c: c["annotations"][2].update(image_id=99),
        r"annotation 102: image_id must be in 'images', received 99",
    ),
    "three numbers": (
        lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
        r"annotation 100: bbox must be \[x, y, width, height\] .* received \[1, 2, 3\]",
    ),
    "nan": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "bbox must be"),
    "odd polygon": (
        lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        "must be a list of polygons",
    ),
    "size of an RLE": (
        lambda c: c["annotations"][0].update(segmentation={"counts": "a", "size": [60, 40]}),
        r"size \[40, 60\] of its image .* received size \[60, 40\]",
    ),
    "short RLE": (
        lambda c: c["annotations"][0].update(segmentation={"counts": [9], "size": [40, 60]}),
        r"counts for all its pixels, received .* counts \[9\]",
    ),
    "no images": (lambda c: c.update(images=[], annotations=[]), "at least one image.*received 0"),
    "no objects": (lambda c: c.update(annotations=[]), r"image with an object, received 6 images"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_the_entry(tmp_path, kind):
    break_content, message = BAD[kind]
    content = coco_content()
    file = write_coco(tmp_path, content)
    break_content(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"instances\.json.*{message}"):
        load_coco(file, tmp_path / "images")


def test_malformed_json(tmp_path):
    file = tmp_path / "instances.json"
    for content in (b'{"images": [', b"\xff\xfe", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"instances\.json must be JSON"):
            load_coco(file, tmp_path)
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"instances\.json must hold an object, received a list"):
        load_coco(file, tmp_path)


def test_more_objects_than_slots(tmp_path):
    with pytest.raises(ValueError, match=r"max_boxes=2 objects, received 3 for 2\.png; raise"):
        load(tmp_path, coco_content(), max_boxes=2)


def test_missing_files(tmp_path):
    file = write_coco(tmp_path, coco_content())
    (tmp_path / "images" / "4.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 image files are missing, .*/4\.png; is"):
        load_coco(file, tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"no folder of images .*nowhere"):
        load_coco(file, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_coco(tmp_path / "absent.json", tmp_path)


def test_files_in_folders(tmp_path):
    content = coco_content(2)
    content["images"][1]["file_name"] = "a/b/1.png"
    (tmp_path / "images" / "a" / "b").mkdir(parents=True)
    assert load(tmp_path, content)[1]["image"].startswith(b"\x89PNG")
    (tmp_path / "images" / "a" / "b" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 image files .*a/b/1\.png"):
        load_coco(tmp_path / "instances.json", tmp_path / "images")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole[:300], r"3\.png must be a whole JPEG or PNG image, received 300 b"),
        (lambda _: encode(smooth_image(60, 41)), r"3\.png must be 60x40 .* received 60x41"),
        (
            lambda _: encode(smooth_image(40, 60)),
            r"3\.png .* received 40x60 .* the orientation tag is ignored",
        ),
    ],
)
def test_a_bad_image_is_named_in_the_middle_of_training(tmp_path, change, message):
    source = load(tmp_path, coco_content(), masks=False)
    file = tmp_path / "images" / "3.png"
    file.write_bytes(change(file.read_bytes()))
    example = (DecodeAnnotatedImage(), PadBoxes(slots=3), PadImage(buckets=((60, 60),)))
    options = {"batch_size": 2, "example": example}
    with pytest.raises(ValueError, match=f"of instances: {message}"):
        list(zip(train_batches(source, seed=0, **options), range(9), strict=False))
    with pytest.raises(ValueError, match=message):
        list(eval_batches(source, **options))


def test_a_selection_is_a_source(tmp_path):
    source = load(tmp_path, coco_content())
    chosen = source.select([4, 1], name="two")
    assert (len(chosen), chosen.name, chosen[0]["id"], chosen[1]["id"]) == (2, "two", 14, 11)
