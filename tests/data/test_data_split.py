"""ImageSplit accepts what its docstring promises and nothing else."""

import dataclasses

import numpy as np
import pytest

from wsbcn_flax.data import ImageSplit

GOOD = ImageSplit(
    images=np.zeros((3, 4, 5, 1), np.uint8),
    labels=np.array([0, 1, 2], np.int32),
    num_classes=3,
    name="good",
    class_names=("cat", "dog", "emu"),
)


def test_length_and_shape():
    assert len(GOOD) == 3
    assert GOOD.image_shape == (4, 5, 1)


def test_classes_are_named_by_their_numbers_unless_named():
    assert GOOD.class_names == ("cat", "dog", "emu")
    assert dataclasses.replace(GOOD, class_names=()).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((3, 4, 5, 1), np.float32)}, r"images must be uint8 .* got float32"),
        ({"images": np.zeros((3, 4, 5), np.uint8)}, r"images must be .* \[3, 4, 5\]"),
        ({"images": np.zeros((0, 4, 5, 1), np.uint8)}, "not empty"),
        ({"labels": np.zeros(3, np.int64)}, r"labels must be int32 \[3\].* got int64"),
        ({"labels": np.zeros(4, np.int32)}, r"labels must be int32 \[3\].* \[4\]"),
        ({"labels": np.array([0, 1, 3], np.int32)}, r"in \[0, num_classes=3\), got 0 to 3"),
        ({"labels": np.array([-1, 1, 2], np.int32)}, "got -1 to 2"),
        ({"class_names": ("cat", "dog")}, r"good: class_names .* 3 classes, received 2"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, **change)
