"""Batches of several shapes: their content, and their independence of hosts and resumption."""

import contextlib
import itertools

import numpy as np
import pytest
from coco_files import coco_content, write_coco

from wsbcn_flax.data import (
    DecodeAnnotatedImage,
    Normalize,
    PadBoxes,
    PadImage,
    RandomFlipObjects,
    RasterizeMasks,
    ResizeShorter,
    bucketed_eval_batches,
    bucketed_train_batches,
    load_coco,
    split_by_bucket,
    train_batches,
)

BUCKETS = ((24, 36), (36, 24))
RESIZE = ResizeShorter(shorter=24, longer=36)
PREPARE = (RasterizeMasks(size=8), DecodeAnnotatedImage(), RESIZE)
PAD = (Normalize([0.5] * 3, [0.2] * 3), PadImage(buckets=BUCKETS), PadBoxes(slots=3))
TRAIN = (*PREPARE, RandomFlipObjects(), *PAD)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """14 images, 10 of which are wide."""
    folder = tmp_path_factory.mktemp("coco")
    sizes = [(40, 60), (40, 50), (60, 40), (40, 40), (30, 70)]
    sizes += [(40, 60), (70, 30)]
    return load_coco(write_coco(folder, coco_content(14, sizes=sizes)), folder / "images")


@pytest.fixture(scope="module")
def sources(source):
    return split_by_bucket(source, BUCKETS, resize=RESIZE)


def take(count, sources, **options):
    options = {"batch_size": 4, "seed": 3, "example": TRAIN} | options
    with contextlib.closing(bucketed_train_batches(sources, **options)) as batches:
        return list(itertools.islice(batches, count))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_every_image_is_in_the_bucket_that_it_fits(source, sources):
    assert [len(each) for each in sources] == [10, 4]
    assert [each.name for each in sources] == ["instances in 24x36", "instances in 36x24"]
    for wide, each in zip((True, False), sources, strict=True):
        assert all((image.width >= image.height) == wide for image in each.images)
    ids = [image.id for each in sources for image in each.images]
    assert sorted(ids) == [image.id for image in source.images]
    assert len(split_by_bucket(sources[1], BUCKETS, resize=RESIZE)) == 1
    with pytest.raises(ValueError, match=r"40x60 .* must fit one of the buckets 24x36, 36x24"):
        split_by_bucket(source, BUCKETS)


def test_batches_are_what_a_detector_takes(sources):
    for batch in take(4, sources):
        shapes = {key: (value.dtype.name, value.shape) for key, value in batch.items()}
        assert shapes.pop("image") in [("float32", (4, 24, 36, 3)), ("float32", (4, 36, 24, 3))]
        assert shapes == {
            "image_hw": ("int32", (4, 2)),
            "boxes": ("float32", (4, 3, 4)),
            "labels": ("int32", (4, 3)),
            "valid": ("bool", (4, 3)),
            "masks": ("uint8", (4, 3, 8, 8)),
            "id": ("int32", (4,)),
        }
        height, width = batch["image_hw"].T
        assert (batch["boxes"][..., 2] <= width[:, np.newaxis]).all()
        assert (batch["boxes"][..., 3] <= height[:, np.newaxis]).all()


def test_shares_are_exact_and_every_image_is_seen_as_often(sources):
    """14 batches have 40 wide images, which is 4 epochs of 10, and 16 tall ones, 4 epochs of 4."""
    batches = take(28, sources)
    wide = [batch["image"].shape[2] == 36 for batch in batches]
    assert (sum(wide[:14]), sum(wide[14:])) == (10, 10)
    assert wide[:14] != wide[14:], "every round has an order of its own"
    ids, counts = np.unique([batch["id"] for batch in batches], return_counts=True)
    assert (len(ids), set(counts)) == (14, {8})


@pytest.mark.parametrize("start_step", [1, 5, 17])
def test_resuming_from_the_step_alone_is_exact(sources, start_step):
    whole = take(start_step + 3, sources)
    assert_same(take(3, sources, start_step=start_step, num_threads=2), whole[start_step:])


def test_hosts_draw_the_same_bucket_and_share_its_batch(sources):
    hosts = [take(6, sources, host_index=index, host_count=2) for index in range(2)]
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]
    assert_same(joined, take(6, sources))


def test_seeds_draw_other_orders(sources):
    first, second = ([b["id"].tolist() for b in take(6, sources, seed=s)] for s in (0, 1))
    assert first != second


def test_evaluation_reads_every_image_once(source, sources):
    batches = list(bucketed_eval_batches(sources, batch_size=4, example=(*PREPARE, *PAD)))
    assert [batch["image"].shape[1:3] for batch in batches] == [(24, 36)] * 3 + [(36, 24)]
    ids = np.concatenate([batch["id"][batch["mask"] == 1] for batch in batches])
    assert sorted(ids) == [image.id for image in source.images]


def test_one_bucket_needs_none_of_it(source):
    square = (*PREPARE, PadImage(buckets=((36, 36),)), PadBoxes(slots=3))
    with contextlib.closing(
        train_batches(source, batch_size=14, seed=0, example=square)
    ) as batches:
        batch = next(batches)
    assert batch["image"].shape == (14, 36, 36, 3)
    assert sorted(batch["id"]) == [image.id for image in source.images]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5}, r"at most the 4 examples of the source, .*received 5"),
        ({"seed": -1}, "received -1 and 0"),
        ({"start_step": -1}, "received 3 and -1"),
        ({"host_count": 3}, "received host 0 of 3 and 4"),
    ],
)
def test_rejects(sources, options, message):
    with pytest.raises(ValueError, match=message):
        take(1, sources, **options)
