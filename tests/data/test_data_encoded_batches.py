"""Streams of encoded images: the same promises as streams from memory, and one decoder."""

import contextlib
import dataclasses
import itertools
import threading

import numpy as np
import pytest
from encoded_images import color, encode, plain_records, plain_split, smooth_image

from wsbcn_flax.data import (
    IMAGENET_STATISTICS,
    EncodedSplit,
    encoded_eval_batches,
    encoded_train_batches,
    eval_crop,
)

MEAN, STD = IMAGENET_STATISTICS
CONSTANTS = {"mean": MEAN, "std": STD, "image_size": 12}
TRAIN = {"batch_size": 8, "seed": 3, **CONSTANTS}
EVAL = {"batch_size": 8, "resize": 14, **CONSTANTS}


def take(count, split, **options):
    with contextlib.closing(encoded_train_batches(split, **(TRAIN | options))) as batches:
        return list(itertools.islice(batches, count))


def evaluate(split, **options):
    with contextlib.closing(encoded_eval_batches(split, **(EVAL | options))) as batches:
        return list(batches)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def join_hosts(hosts):
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]


@pytest.fixture(scope="module")
def varied():
    """Images in which every crop is another."""
    records = [
        {"image": encode(smooth_image(20 + n, 50 - n, seed=n), "JPEG"), "label": n}
        for n in range(21)
    ]
    return EncodedSplit(source=records, num_classes=21, name="varied")


def test_every_epoch_decodes_every_image_once():
    """10 images in batches of 4: every 5 batches are two epochs end to end."""
    batches = take(10, plain_split(10), batch_size=4)
    labels = np.concatenate([batch["label"] for batch in batches]).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(labels), np.tile(np.arange(10), (4, 1)))
    for batch in batches:
        assert (batch["image"].shape, batch["image"].dtype) == ((4, 12, 12, 3), np.float32)
        assert batch["label"].dtype == np.int32
        for image, label in zip(batch["image"], batch["label"], strict=True):
            expected = np.broadcast_to((color(label) / 255 - MEAN) / STD, image.shape)
            np.testing.assert_allclose(image, expected, atol=1e-5)


def test_crops_differ_between_epochs_and_images(varied):
    images = np.concatenate([batch["image"] for batch in take(8, varied, batch_size=21)])
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("num_threads", [0, 2, 16])
def test_threads_change_nothing(varied, num_threads):
    assert_same(take(6, varied, num_threads=num_threads), take(6, varied, num_threads=1))
    assert_same(evaluate(varied, num_threads=num_threads), evaluate(varied, num_threads=1))


@pytest.mark.parametrize("start_step", [1, 2, 3, 50])
def test_resuming_from_the_step_alone_is_exact(varied, start_step):
    whole = take(start_step + 2, varied)
    assert_same(take(2, varied, start_step=start_step), whole[start_step:])


@pytest.mark.parametrize("host_count", [2, 4])
def test_hosts_together_make_the_same_batches(varied, host_count):
    hosts = [{"host_index": index, "host_count": host_count} for index in range(host_count)]
    assert_same(join_hosts([take(5, varied, **host) for host in hosts]), take(5, varied))
    assert_same(join_hosts([evaluate(varied, **host) for host in hosts]), evaluate(varied))


def test_a_host_reads_its_own_rows_only():
    class Counted(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    source = Counted(plain_records(16))
    split = EncodedSplit(source=source, num_classes=16, name="counted")
    take(3, split, host_index=1, host_count=4, num_threads=0)
    assert source.read == 3 * 2


def test_seeds_give_different_crops(varied):
    first, second = (take(1, varied, seed=seed, batch_size=21)[0] for seed in (0, 1))
    assert not np.array_equal(first["label"], second["label"])
    by_label = [batch["image"][np.argsort(batch["label"])] for batch in (first, second)]
    assert (by_label[0] != by_label[1]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("count", [1, 8, 21])
def test_evaluation_crops_every_image_once_in_order(varied, count):
    split = dataclasses.replace(varied, source=varied.source[:count])
    batches = evaluate(split)
    assert {batch["image"].shape for batch in batches} == {(8, 12, 12, 3)}
    images, labels, mask = (
        np.concatenate([batch[key] for batch in batches]) for key in ("image", "label", "mask")
    )
    assert (images.dtype, labels.dtype, mask.dtype) == (np.float32, np.int32, np.float32)
    assert len(mask) == -(-count // 8) * 8
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < count)
    np.testing.assert_array_equal(labels[:count], np.arange(count))
    crops = [eval_crop(r["image"], image_size=12, resize=14) for r in split.source]
    np.testing.assert_allclose(images[:count], (np.stack(crops) / 255 - MEAN) / STD, atol=1e-5)
    assert not images[count:].any()
    assert not labels[count:].any()


def test_decoding_leaves_no_threads(varied):
    before = set(threading.enumerate())
    with contextlib.closing(encoded_train_batches(varied, **TRAIN)) as batches:
        next(batches)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.mark.parametrize("num_threads", [0, 4])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": b"junk"}, r"record 5 of plain must be a whole JPEG .* received 4 bytes"),
        (
            {"image": b"junk", "file_name": b"a/b.JPEG"},
            r"record 5 of plain \(a/b\.JPEG\) must be",
        ),
        ({"label": -1}, r"record 5 of plain .* label in \[0, 9\), received -1"),
        ({"label": 9, "file_name": "c.JPEG"}, r"plain \(c\.JPEG\) .* received 9"),
    ],
)
def test_a_bad_record_is_named(num_threads, change, message):
    records = plain_records(9)
    records[5] |= change
    split = EncodedSplit(source=records, num_classes=9, name="plain")
    for run in (evaluate, lambda *args, **options: take(2, *args, **options)):
        with pytest.raises(ValueError, match=message):
            run(split, num_threads=num_threads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "host_count": 4}, "got 6 for 4"),
        ({"batch_size": 22}, "at most the 21 images of varied.*got 22"),
        ({"seed": -1}, "got -1 and 0"),
        ({"num_threads": -1}, "num_threads must be >= 0, got -1"),
        ({"image_size": 0}, "image_size must be a positive"),
        ({"mean": [0.5]}, "mean must be one finite number for each of 3 channels"),
    ],
)
def test_training_rejects(varied, options, message):
    with pytest.raises(ValueError, match=message):
        take(1, varied, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_index": 2, "host_count": 2}, "got 2 of 2 hosts"),
        ({"resize": 11}, "at least image_size=12"),
        ({"std": [1.0, 1.0, 0.0]}, "std must be positive"),
    ],
)
def test_evaluation_rejects(varied, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(varied, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": []}, "varied: a split must hold at least one image"),
        ({"class_names": ("cat",)}, "class_names must be one for each of 21 classes, received 1"),
    ],
)
def test_split_rejects(varied, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(varied, **change)
