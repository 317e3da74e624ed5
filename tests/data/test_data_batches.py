"""The streams of batches: what they hold, and what they must not depend on."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import wsbcn_flax
from wsbcn_flax.data import Augment, eval_batches, train_batches

REPOSITORY = Path(wsbcn_flax.__file__).parents[1]
CONSTANTS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
AUGMENT = Augment(crop_padding=2, horizontal_flip=True)


def take(count, split, **options):
    """The first batches of a training stream."""
    defaults = {"batch_size": 8, "seed": 3, "augment": AUGMENT, **CONSTANTS}
    with contextlib.closing(train_batches(split, **(defaults | options))) as batches:
        return list(itertools.islice(batches, count))


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def normalized(images):
    return (images / 255 - CONSTANTS["mean"]) / CONSTANTS["std"]


def test_every_epoch_visits_every_sample_once(coded_split):
    labels = labels_of(take(3 * 6, coded_split(48))).reshape(3, 48)
    np.testing.assert_array_equal(np.sort(labels), np.tile(np.arange(48), (3, 1)))
    assert not np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[1], labels[2])


def test_a_batch_crosses_epochs_and_nothing_is_dropped(coded_split):
    """10 samples in batches of 4: every 5 batches are two epochs end to end."""
    labels = labels_of(take(10, coded_split(10), batch_size=4)).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(labels), np.tile(np.arange(10), (4, 1)))


def test_images_belong_to_their_labels_and_are_normalized(coded_split):
    split = coded_split(16)
    for batch in take(4, split, augment=None):
        assert batch["image"].dtype == np.float32
        assert batch["label"].dtype == np.int32
        expected = normalized(split.images[batch["label"]])
        np.testing.assert_allclose(batch["image"], expected, atol=1e-5)


def test_augmented_images_are_one_of_the_crops_of_their_sample(coded_split):
    split = coded_split(16)
    choices = np.array(list(itertools.product(range(5), range(5), (0, 1))))
    seen = Counter()
    for batch in take(6, split):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            copies = np.repeat(split.images[label : label + 1], len(choices), axis=0)
            crops = normalized(AUGMENT.apply(copies, choices))
            matches = np.flatnonzero(np.abs(crops - image).max(axis=(1, 2, 3)) < 1e-5)
            assert len(matches) == 1
            seen[int(matches[0])] += 1
    assert len(seen) > 20, "48 images in all must not share a few of the 50 crops"


def test_augmentation_leaves_the_order_alone(coded_split):
    split = coded_split(20)
    np.testing.assert_array_equal(
        labels_of(take(10, split, augment=None)), labels_of(take(10, split, augment=AUGMENT))
    )


def test_seeds_give_different_streams(coded_split):
    split = coded_split(48)
    orders = {labels_of(take(6, split, seed=seed)).tobytes() for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("num_threads", [0, 2, 4])
def test_threads_change_nothing(coded_split, num_threads):
    split = coded_split(50)
    assert_same(take(20, split, num_threads=num_threads), take(20, split, num_threads=1))


@pytest.mark.parametrize("start_step", [0, 1, 6, 7, 13, 100])
def test_resuming_from_the_step_alone_is_exact(coded_split, start_step):
    split = coded_split(50)
    whole = take(start_step + 4, split)
    assert_same(take(4, split, start_step=start_step), whole[start_step:])


@pytest.mark.parametrize("host_count", [2, 4])
def test_hosts_together_make_the_same_global_batch(coded_split, host_count):
    split = coded_split(50)
    parts = [
        take(10, split, host_index=index, host_count=host_count) for index in range(host_count)
    ]
    together = [
        {key: np.concatenate([part[key] for part in batch]) for key in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert_same(together, take(10, split))


def checksum(batches) -> int:
    return zlib.crc32(b"".join(batch["image"].tobytes() for batch in batches))


OTHER_PROCESS = """
import zlib
import numpy as np
from wsbcn_flax.data import Augment, ImageSplit, train_batches

images = np.random.default_rng(50).integers(1, 256, (50, 5, 6, 3), dtype=np.uint8)
split = ImageSplit(
    images=images, labels=np.arange(50, dtype=np.int32), num_classes=50, name="coded"
)
batches = train_batches(
    split, batch_size=8, seed=3, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25],
    augment=Augment(crop_padding=2, horizontal_flip=True), num_threads=2,
)
print(zlib.crc32(b"".join(next(batches)["image"].tobytes() for _ in range(5))))
"""


def test_another_process_makes_the_same_batches_and_ends_without_close(coded_split):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OTHER_PROCESS],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": "123"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == checksum(take(5, coded_split(50)))


def prefetch_threads():
    return [thread for thread in threading.enumerate() if "grain-prefetch" in thread.name]


def test_close_ends_the_threads(coded_split):
    before = set(prefetch_threads())
    batches = train_batches(coded_split(16), batch_size=4, seed=0, num_threads=3, **CONSTANTS)
    for _ in range(10):
        next(batches)
    started = set(prefetch_threads()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "positive multiple of the number of hosts, got 0 for 1"),
        ({"batch_size": 6, "host_count": 4}, "got 6 for 4"),
        ({"batch_size": 17}, "at most the 16 images of coded.*got 17"),
        ({"host_index": 2, "host_count": 2}, "got 2 of 2 hosts"),
        ({"host_index": -1}, "got -1 of 1"),
        ({"seed": -1}, "got -1 and 0"),
        ({"start_step": -5}, "got 3 and -5"),
        ({"num_threads": -1}, "num_threads must be >= 0, got -1"),
        ({"mean": [0.5]}, "mean must be one finite number for each of 3 channels"),
        ({"std": [0.5, 0.5, 0.0]}, "std must be positive"),
    ],
)
def test_training_rejects(coded_split, options, message):
    with pytest.raises(ValueError, match=message):
        take(1, coded_split(16), **options)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 21])
@pytest.mark.parametrize("host_count", [1, 2, 4])
def test_evaluation_covers_every_sample_once_in_order(coded_split, count, host_count):
    split = coded_split(count)
    hosts = [
        list(
            eval_batches(split, batch_size=8, host_index=index, host_count=host_count, **CONSTANTS)
        )
        for index in range(host_count)
    ]
    assert {len(batches) for batches in hosts} == {-(-count // 8)}
    rows = [batch for step in zip(*hosts, strict=True) for batch in step]
    assert {batch["image"].shape for batch in rows} == {(8 // host_count, 5, 6, 3)}
    images, labels, mask = (
        np.concatenate([batch[key] for batch in rows]) for key in ("image", "label", "mask")
    )
    assert (images.dtype, labels.dtype, mask.dtype) == (np.float32, np.int32, np.float32)
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < count)
    np.testing.assert_array_equal(labels[:count], split.labels)
    np.testing.assert_allclose(images[:count], normalized(split.images), atol=1e-5)
    assert not images[count:].any()
    assert not labels[count:].any()


@pytest.mark.parametrize("num_threads", [0, 3])
def test_evaluation_does_not_depend_on_threads(coded_split, num_threads):
    split = coded_split(50)
    assert_same(
        list(eval_batches(split, batch_size=8, num_threads=num_threads, **CONSTANTS)),
        list(eval_batches(split, batch_size=8, **CONSTANTS)),
    )


def test_evaluation_rejects_hosts_that_do_not_divide_the_batch(coded_split):
    with pytest.raises(ValueError, match="got 8 for 3"):
        eval_batches(coded_split(9), batch_size=8, host_count=3, **CONSTANTS)
