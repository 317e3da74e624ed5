"""Sources accept what their docstrings promise and nothing else."""

import dataclasses

import numpy as np
import pytest

from wsbcn_flax.data import EncodedSource, ImageSource

GOOD = ImageSource(
    images=np.zeros((3, 4, 5, 1), np.uint8),
    labels=np.array([0, 1, 2], np.int32),
    num_classes=3,
    name="good",
    class_names=("cat", "dog", "emu"),
)


def test_length_and_shape():
    assert len(GOOD) == 3
    assert GOOD.image_shape == (4, 5, 1)


def test_one_example_and_several():
    example = GOOD[2]
    assert (example["image"].shape, example["label"], example["label"].dtype) == (
        (4, 5, 1),
        2,
        np.int32,
    )
    np.testing.assert_array_equal(GOOD.take([2, 0])["label"], [2, 0])


def test_classes_are_named_by_their_numbers_unless_named():
    assert GOOD.class_names == ("cat", "dog", "emu")
    assert dataclasses.replace(GOOD, class_names=()).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": np.zeros((3, 4, 5, 1), np.float32)},
            r"images must be uint8 .* received float32",
        ),
        ({"images": np.zeros((3, 4, 5), np.uint8)}, r"images must be .* \[3, 4, 5\]"),
        ({"images": np.zeros((0, 4, 5, 1), np.uint8)}, "at least one image"),
        ({"labels": np.zeros(3, np.int64)}, r"labels int32 .* and int64 \[3\]"),
        ({"labels": np.zeros(4, np.int32)}, r"labels int32 .* and int32 \[4\]"),
        ({"labels": np.array([0, 1, 3], np.int32)}, r"in \[0, num_classes=3\), .* from 0 to 3"),
        ({"labels": np.array([-1, 1, 2], np.int32)}, "from -1 to 2"),
        ({"class_names": ("cat", "dog")}, r"good: class_names .* 3 classes, received 2"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": []}, "pets: there must be at least one image"),
        ({"class_names": ("cat",)}, "class_names must be one for each of 2 classes, received 1"),
    ],
)
def test_encoded_source_rejects(change, message):
    source = EncodedSource(records=[{"image": b"", "label": 0}], num_classes=2, name="pets")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(source, **change)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"label": -1, "file_name": b"a.JPEG"}, r"^a\.JPEG label must .* received -1; .* secret"),
        ({"label": 2}, r"^the label must be in \[0, 2\), received 2"),
    ],
)
def test_encoded_source_checks_labels(record, message):
    source = EncodedSource(records=[{"image": b"", **record}], num_classes=2, name="pets")
    with pytest.raises(ValueError, match=message):
        source[0]
