"""Batches of every kind of source: their content, and their independence of workers and hosts."""

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
from encoded_images import encode, smooth_image

import wsbcn_flax
from wsbcn_flax.data import (
    CentralCrop,
    DecodeImage,
    EncodedSource,
    ImageSource,
    Normalize,
    RandomCrop,
    RandomFlip,
    RandomResizedCrop,
    eval_batches,
    train_batches,
)

REPOSITORY = Path(wsbcn_flax.__file__).parents[1]
NORMALIZE = Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
AUGMENT = (RandomCrop(padding=2), RandomFlip())


def memory_source(count):
    images = np.random.default_rng(count).integers(1, 256, (count, 5, 6, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int32)
    return ImageSource(images=images, labels=labels, num_classes=count, name="numbered")


def encoded_source(count):
    records = [
        {"image": encode(smooth_image(20 + n, 50 - n % 20, seed=n), "JPEG"), "label": n}
        for n in range(count)
    ]
    return EncodedSource(records=records, num_classes=count, name="numbered")


class Boxes:
    """Examples like those of detection, with other names and shapes and a random choice."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        boxes = np.full((1 + index % 3, 4), index, np.float32)
        return {"boxes": boxes, "label": np.int32(index), "masks": np.ones((2, 3, 3), bool)}

    class Pad:
        def random_map(self, element, rng):
            boxes = element["boxes"]
            padded = np.concatenate([boxes, np.zeros((3 - len(boxes), 4), np.float32)])
            return {**element, "boxes": padded, "scale": rng.normal()}


TRAIN = {
    "memory": (memory_source, {"batch": (*AUGMENT, NORMALIZE)}),
    "memory, one by one": (memory_source, {"example": AUGMENT, "batch": (NORMALIZE,)}),
    "encoded": (
        encoded_source,
        {
            "example": (DecodeImage(), RandomResizedCrop(image_size=12), RandomFlip()),
            "batch": (RandomCrop(padding=1), NORMALIZE),
        },
    ),
    "boxes": (Boxes, {"example": (Boxes.Pad(),)}),
}
EVAL = {
    "memory": (memory_source, {"batch": (NORMALIZE,)}),
    "encoded": (
        encoded_source,
        {"example": (DecodeImage(), CentralCrop(image_size=12, resize=14), NORMALIZE)},
    ),
    "boxes": (Boxes, {"example": (type("Pad", (), {"map": lambda _, e: e | {"boxes": 1}})(),)}),
}
KINDS = pytest.mark.parametrize("kind", TRAIN)
EVAL_KINDS = pytest.mark.parametrize("kind", EVAL)


def take(count, source, **options):
    """The first batches of a training stream."""
    defaults = {"batch_size": 8, "seed": 3}
    with contextlib.closing(train_batches(source, **(defaults | options))) as batches:
        return list(itertools.islice(batches, count))


def train(kind, count, *, size, **options):
    make, transforms = TRAIN[kind]
    return take(count, make(size), **(transforms | options))


def evaluate(kind, *, size, **options):
    make, transforms = EVAL[kind]
    batches = eval_batches(make(size), **({"batch_size": 8} | transforms | options))
    with contextlib.closing(batches):
        return list(batches)


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def join_hosts(make, host_count):
    hosts = [make(host_index=index, host_count=host_count) for index in range(host_count)]
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]


@pytest.mark.parametrize("kind", ["memory", "encoded"])
@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4)])
def test_every_epoch_visits_every_sample_once(kind, size, batch_size):
    """10 samples in batches of 4: every 5 batches are two epochs end to end."""
    batches = train(kind, 4 * size // batch_size, size=size, batch_size=batch_size)
    labels = labels_of(batches).reshape(4, size)
    np.testing.assert_array_equal(np.sort(labels), np.tile(np.arange(size), (4, 1)))
    assert len({tuple(epoch) for epoch in labels}) == 4
    assert batches[0]["image"].dtype == np.float32
    assert labels.dtype == np.int32


def test_images_belong_to_their_labels_and_are_normalized():
    source = memory_source(16)
    for batch in take(4, source, batch=(NORMALIZE,)):
        expected = NORMALIZE.map({"image": source.images[batch["label"]]})["image"]
        np.testing.assert_array_equal(batch["image"], expected)


@pytest.mark.parametrize("where", ["example", "batch"])
def test_augmented_images_are_one_of_the_crops_of_their_sample(where):
    source = memory_source(16)
    padded = np.pad(source.images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = Counter()
    for batch in take(6, source, **{where: AUGMENT}):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            matches = [
                (top, left, flip)
                for top, left, flip in itertools.product(range(5), range(5), (1, -1))
                if (padded[label, top : top + 5, left : left + 6][:, ::flip] == image).all()
            ]
            assert len(matches) == 1
            seen[matches[0]] += 1
    assert len(seen) > 20, "48 images in all must not share a few of the 50 crops"


@KINDS
def test_samples_are_augmented_independently_and_anew_in_every_epoch(kind):
    batches = train(kind, 4, size=16)
    key = "scale" if kind == "boxes" else "image"
    values = np.concatenate([batch[key] for batch in batches])
    # In two epochs of 16, a few samples get one of their 50 crops twice by chance.
    assert len({value.tobytes() for value in values}) > 0.8 * len(values)


def test_transforms_leave_the_order_alone():
    orders = [labels_of(train(kind, 10, size=20)) for kind in TRAIN]
    for order in orders:
        np.testing.assert_array_equal(order, orders[0])


@KINDS
def test_two_random_transforms_of_a_kind_draw_apart(kind):
    class Draw:
        def __init__(self, name):
            self.name = name

        def random_map(self, element, rng):
            return {**element, self.name: rng.random(size=np.shape(element["label"]))}

    names = {"example": ("one", "two"), "batch": ("three", "four")}
    make, options = TRAIN[kind]
    (batch,) = take(
        1, make(16), **{key: (*options.get(key, ()), *map(Draw, names[key])) for key in names}
    )
    assert len(np.unique([batch[name] for name in ("one", "two", "three", "four")])) == 4 * 8


def test_seeds_give_different_streams():
    first, second = (train("encoded", 1, size=8, seed=seed)[0] for seed in (0, 1))
    assert not np.array_equal(first["label"], second["label"])
    by_label = [batch["image"][np.argsort(batch["label"])] for batch in (first, second)]
    assert (by_label[0] != by_label[1]).any(axis=(1, 2, 3)).all()


@KINDS
@pytest.mark.parametrize("num_threads", [0, 4])
def test_threads_change_nothing(kind, num_threads):
    first = train(kind, 6, size=21)
    assert_same(train(kind, 6, size=21, num_threads=num_threads), first)


@KINDS
@pytest.mark.parametrize("start_step", [1, 3, 50])
def test_resuming_from_the_step_alone_is_exact(kind, start_step):
    whole = train(kind, start_step + 2, size=21)
    assert_same(train(kind, 2, size=21, start_step=start_step), whole[start_step:])


def test_resuming_takes_no_longer_the_later():
    assert len(train("memory", 1, size=21, start_step=10**15)[0]["label"]) == 8


@KINDS
@pytest.mark.parametrize("host_count", [2, 4])
def test_hosts_together_make_the_same_global_batches(kind, host_count):
    joined = join_hosts(lambda **host: train(kind, 5, size=21, **host), host_count)
    assert_same(joined, train(kind, 5, size=21))


def test_a_host_reads_its_own_rows_only():
    class Counted(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    source = Counted({"x": np.float32(number)} for number in range(16))
    take(3, source, host_index=1, host_count=4, num_threads=0)
    assert source.read == 3 * 2


OTHER_PROCESS = """
import sys, zlib
sys.path[:0] = ["tests", "tests/data"]
from test_data_pipeline import train
batches = train("memory", 5, size=50, num_threads=2)
print(zlib.crc32(b"".join(batch["image"].tobytes() for batch in batches)))
from wsbcn_flax.data import train_batches
next(train_batches([{"x": 1.0}] * 4, batch_size=2, seed=0, num_threads=2))
"""


def test_another_process_makes_the_same_batches_and_ends_without_close():
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
    ours = b"".join(batch["image"].tobytes() for batch in train("memory", 5, size=50))
    assert int(done.stdout) == zlib.crc32(ours)


@pytest.mark.parametrize("kind", ["memory", "encoded"])
def test_close_ends_the_threads(kind):
    before = set(threading.enumerate())
    make, transforms = TRAIN[kind]
    batches = train_batches(make(16), batch_size=4, seed=0, num_threads=3, **transforms)
    for _ in range(10):
        next(batches)
    started = {thread for thread in threading.enumerate() if thread.ident} - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=30)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "positive multiple of host_count, received host 0 of 1 and 0"),
        ({"batch_size": 6, "host_count": 4}, "received host 0 of 4 and 6"),
        ({"batch_size": 17}, "at most the 16 examples of the source.*received 17"),
        ({"host_index": 2, "host_count": 2}, "received host 2 of 2"),
        ({"host_index": -1}, "received host -1 of 1"),
        ({"seed": -1}, "received -1 and 0"),
        ({"start_step": -5}, "received 3 and -5"),
        ({"num_threads": -1}, "num_threads must be >= 0, received -1"),
    ],
)
def test_training_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        train("memory", 1, size=16, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8, "host_count": 3}, "received host 0 of 3 and 8"),
        ({"host_index": 2, "host_count": 2}, "received host 2 of 2"),
        ({"num_threads": -1}, "num_threads must be >= 0, received -1"),
        ({"batch": AUGMENT}, r"must not be random, received RandomCrop"),
    ],
)
def test_evaluation_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate("memory", size=16, **options)


@EVAL_KINDS
@pytest.mark.parametrize("size", [1, 8, 9, 21])
@pytest.mark.parametrize("host_count", [1, 4])
@pytest.mark.parametrize("num_threads", [0, 3])
def test_evaluation_covers_every_sample_once_in_order(kind, size, host_count, num_threads):
    batches = join_hosts(
        lambda **host: evaluate(kind, size=size, num_threads=num_threads, **host), host_count
    )
    assert len(batches) == -(-size // 8)
    assert {len(value) for batch in batches for value in batch.values()} == {8}
    values = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    assert (values["label"].dtype, values["mask"].dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(values["mask"], np.arange(8 * len(batches)) < size)
    np.testing.assert_array_equal(values["label"][:size], np.arange(size))
    for value in values.values():
        assert not value[size:].any()
    source, images = EVAL[kind][0](size), values.get("image")
    if kind == "memory":
        expected = NORMALIZE.map({"image": source.images})["image"]
        np.testing.assert_array_equal(images[:size], expected)
    if kind == "encoded":
        for image, record in zip(images[:size], source.records, strict=True):
            for transform in EVAL[kind][1]["example"]:
                record = transform.map(record)
            np.testing.assert_array_equal(image, record["image"])


@pytest.mark.parametrize("num_threads", [0, 4])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": b"junk"}, r"record 5 of numbered: the image must be a whole JPEG .* 4 bytes"),
        ({"image": b"junk", "file_name": b"a/b.JPEG"}, r"record 5 of numbered: a/b\.JPEG must be"),
        ({"label": -1}, r"record 5 of numbered: the label must be in \[0, 9\), received -1"),
        ({"label": 9, "file_name": "c.JPEG"}, r"numbered: c\.JPEG label .* received 9"),
    ],
)
def test_a_bad_record_is_named(num_threads, change, message):
    source = encoded_source(9)
    source.records[5].update(change)
    transforms = {"example": EVAL["encoded"][1]["example"], "num_threads": num_threads}
    with pytest.raises(ValueError, match=message):
        take(2, source, **transforms)
    with pytest.raises(ValueError, match=message):
        list(eval_batches(source, batch_size=8, **transforms))


@pytest.mark.parametrize("other", [{"x": np.zeros(3)}, {"x": 0}, {"x": 1.0, "y": 1.0}, {}])
def test_examples_of_different_layouts_are_explained(other):
    with pytest.raises(ValueError, match=r"same keys, dtypes and shapes .* pad them by a transf"):
        take(1, [{"x": 1.0}, other], batch_size=2)
