"""Prepared data sets hold exactly the pixels of their source, however preparing went."""

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cifar_archives import write_cifar

import wsbcn_flax
from wsbcn_flax.data import CifarFormatError, IdxFormatError, builders, load_split
from wsbcn_flax.data._cifar import CIFAR10, CIFAR100
from wsbcn_flax.data._sources import read_digits, read_mnist5k

SOURCES = {"mnist5k": (read_mnist5k, 4000, 1000), "digits": (read_digits, 1437, 360)}
REPOSITORY = Path(wsbcn_flax.__file__).parents[1]


def examples(images: np.ndarray, labels: np.ndarray) -> Counter[tuple[bytes, int]]:
    """What a split holds, whatever its order."""
    return Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


@pytest.fixture(params=sorted(SOURCES))
def packaged(request, prepared_dir):
    """The source arrays and the loaded splits of one packaged data set."""
    read, *sizes = SOURCES[request.param]
    splits = [
        load_split(request.param, split, data_dir=prepared_dir) for split in ("train", "test")
    ]
    return read(), splits, sizes


def test_train_and_test_are_the_source_divided(packaged):
    (images, labels), splits, sizes = packaged
    assert [len(split) for split in splits] == sizes
    train, test = (examples(split.images, split.labels) for split in splits)
    assert train + test == examples(images, labels)
    assert not train & test


def test_classes_keep_their_shares(packaged):
    (_, labels), splits, sizes = packaged
    counts = np.bincount(labels)
    for split, size in zip(splits, sizes, strict=True):
        assert split.num_classes == 10
        assert split.class_names == tuple("0123456789")
        shares = counts * size / len(labels)
        assert np.abs(np.bincount(split.labels, minlength=10) - shares).max() <= 1


def test_digits_fill_the_scale_and_stay_recoverable():
    from sklearn.datasets import load_digits

    images, _ = read_digits()
    np.testing.assert_array_equal(np.unique(images)[[0, -1]], [0, 255])
    original = load_digits().images
    np.testing.assert_array_equal((images[..., 0].astype(int) * 16 + 127) // 255, original)
    assert np.abs(images[..., 0] - original * 255 / 16).max() <= 0.5


def test_preparing_again_gives_the_same_order(prepared_dir, tmp_path):
    first = load_split("digits", "train", data_dir=prepared_dir)
    again = load_split("digits", "train", data_dir=tmp_path)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)


KILLED_HALFWAY = """
import os, signal, sys
from wsbcn_flax.data import builders, load_split

generate = builders.Digits._generate_examples

def generate_and_die(self, images, labels):
    for index, example in generate(self, images, labels):
        if len(images) == 360 and index == 100:  # the test split, after the train split is written
            os.kill(os.getpid(), signal.SIGKILL)
        yield index, example

builders.Digits._generate_examples = generate_and_die
load_split("digits", "train", data_dir=sys.argv[1])
"""


def test_a_killed_preparation_is_done_again(prepared_dir, tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_HALFWAY, str(tmp_path)], cwd=REPOSITORY, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("digits/*/*train*")), "the train split was not yet written"
    for split in ("train", "test"):
        expected = load_split("digits", split, data_dir=prepared_dir)
        np.testing.assert_array_equal(
            load_split("digits", split, data_dir=tmp_path).images, expected.images
        )


def test_two_at_once_leave_one_whole_data_set(prepared_dir, tmp_path, monkeypatch):
    """The second process starts and finishes while the first is writing."""
    generate = builders.Digits._generate_examples

    def generate_and_be_overtaken(self, images, labels):
        monkeypatch.setattr(builders.Digits, "_generate_examples", generate)
        load_split("digits", "train", data_dir=tmp_path)
        yield from generate(self, images, labels)

    monkeypatch.setattr(builders.Digits, "_generate_examples", generate_and_be_overtaken)
    overtaken = load_split("digits", "train", data_dir=tmp_path)
    expected = load_split("digits", "train", data_dir=prepared_dir)
    np.testing.assert_array_equal(overtaken.images, expected.images)
    assert [path.name for path in tmp_path.joinpath("digits").iterdir()] == ["1.0.0"]


def test_preparing_says_nothing_on_the_terminal(tmp_path, capfd):
    load_split("digits", "test", data_dir=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_changed_source_is_refused(tmp_path, monkeypatch):
    images, labels = read_digits()
    monkeypatch.setattr(
        "sklearn.datasets.load_digits",
        lambda: type("Bunch", (), {"data": images.reshape(-1, 64)[:-1] // 16, "target": labels}),
    )
    with pytest.raises(RuntimeError, match=r"scikit-learn must carry 1797 .* \[1796, 64\]"):
        load_split("digits", "train", data_dir=tmp_path)


def test_idx_files_round_trip(tmp_path, write_idx_folder):
    written = write_idx_folder(tmp_path / "idx")
    for split, (images, labels) in written.items():
        loaded = load_split(
            "fashion_mnist", split, data_dir=tmp_path / "data", source_dir=tmp_path / "idx"
        )
        assert examples(loaded.images, loaded.labels) == examples(images, labels)
        assert loaded.class_names[9] == "Ankle boot"


def test_other_idx_files_are_not_taken_for_those_prepared(tmp_path, write_idx_folder):
    write_idx_folder(tmp_path / "one", seed=1)
    write_idx_folder(tmp_path / "two", seed=2)
    data_dir = tmp_path / "data"
    first = load_split("fashion_mnist", "test", data_dir=data_dir, source_dir=tmp_path / "one")
    with pytest.raises(ValueError, match=r"prepared from other files than those now in .*two"):
        load_split("fashion_mnist", "test", data_dir=data_dir, source_dir=tmp_path / "two")
    for source_dir in (None, tmp_path / "one"):
        again = load_split("fashion_mnist", "test", data_dir=data_dir, source_dir=source_dir)
        np.testing.assert_array_equal(again.images, first.images)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 27}, "images must be 28x28 .* got 27x27"),
        ({"num_classes": 11}, "labels below 10, .* labels up to 10"),
    ],
)
def test_idx_files_of_another_kind(tmp_path, write_idx_folder, wrong, message):
    write_idx_folder(tmp_path / "idx", **wrong)
    with pytest.raises(IdxFormatError, match=message):
        load_split("fashion_mnist", "train", data_dir=tmp_path, source_dir=tmp_path / "idx")
    assert not list(tmp_path.glob("fashion_mnist_idx/*"))


@pytest.mark.parametrize(("name", "layout"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_archives_round_trip(tmp_path, name, layout):
    written = write_cifar(tmp_path / "archive", layout)
    for split, (images, labels) in written.items():
        loaded = load_split(
            name, split, data_dir=tmp_path / "data", source_dir=tmp_path / "archive"
        )
        assert examples(loaded.images, loaded.labels) == examples(images, labels)
        assert (loaded.num_classes, loaded.image_shape) == (layout.num_classes, (32, 32, 3))
        assert loaded.class_names == tuple(f"class_{n}" for n in range(layout.num_classes))


def test_another_cifar_archive_is_not_taken_for_that_prepared(tmp_path):
    write_cifar(tmp_path / "one", CIFAR10, seed=1)
    write_cifar(tmp_path / "two", CIFAR10, seed=2)
    load_split("cifar10", "test", data_dir=tmp_path, source_dir=tmp_path / "one")
    with pytest.raises(ValueError, match=r"prepared from other files than those now in .*two"):
        load_split("cifar10", "test", data_dir=tmp_path, source_dir=tmp_path / "two")


def test_a_damaged_cifar_archive_prepares_nothing(tmp_path):
    write_cifar(tmp_path, CIFAR10)
    archive = tmp_path / CIFAR10.archive
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(CifarFormatError, match="not a whole gzip file"):
        load_split("cifar10", "train", data_dir=tmp_path, source_dir=tmp_path)
    assert not list(tmp_path.glob("cifar10_python/*"))
