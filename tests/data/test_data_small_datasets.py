"""Prepared data sets hold exactly the pixels of their source, however preparing went."""

import signal
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from source_files import CLASSES, write_cifar, write_idx_folder

import wsbcn_flax
from wsbcn_flax.data import DatasetFormatError, _small_datasets, load_split
from wsbcn_flax.data._published_files import CIFAR10, CIFAR100
from wsbcn_flax.data._small_datasets import read_digits, read_mnist5k, stratified_split

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
    arrays = [np.concatenate(each) for each in zip(*read().values(), strict=True)]
    return arrays, splits, sizes


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


def test_the_order_on_disk_stays_the_same(prepared_dir):
    """A change here needs a new version: prepared folders of users would differ."""
    labels = load_split("digits", "train", data_dir=prepared_dir).labels
    assert zlib.crc32(labels.astype("<i4").tobytes()) == 2599617076


def test_preparing_again_gives_the_same_order(prepared_dir, tmp_path):
    first = load_split("digits", "train", data_dir=prepared_dir)
    again = load_split("digits", "train", data_dir=tmp_path)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)


KILLED_HALFWAY = """
import os, signal, sys
from wsbcn_flax.data import _small_datasets, load_split

generate = _small_datasets.generate_examples

def generate_and_die(images, labels):
    for index, example in generate(images, labels):
        if len(images) == 360 and index == 100:  # the test split, after the train split is written
            os.kill(os.getpid(), signal.SIGKILL)
        yield index, example

_small_datasets.generate_examples = generate_and_die
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
    generate = _small_datasets.generate_examples

    def generate_and_be_overtaken(images, labels):
        monkeypatch.setattr(_small_datasets, "generate_examples", generate)
        load_split("digits", "train", data_dir=tmp_path)
        yield from generate(images, labels)

    monkeypatch.setattr(_small_datasets, "generate_examples", generate_and_be_overtaken)
    overtaken = load_split("digits", "train", data_dir=tmp_path)
    expected = load_split("digits", "train", data_dir=prepared_dir)
    np.testing.assert_array_equal(overtaken.images, expected.images)
    assert [path.name for path in tmp_path.joinpath("digits").iterdir()] == ["1.0.0"]


def test_preparing_says_nothing_on_the_terminal(tmp_path, capfd):
    load_split("digits", "test", data_dir=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_idx_files_round_trip(tmp_path):
    written = write_idx_folder(tmp_path / "idx")
    for split, (images, labels) in written.items():
        loaded = load_split(
            "fashion", split, data_dir=tmp_path / "data", source_dir=tmp_path / "idx"
        )
        assert examples(loaded.images, loaded.labels) == examples(images, labels)
        assert loaded.class_names[9] == "Ankle boot"


def test_other_idx_files_are_not_taken_for_those_prepared(tmp_path):
    write_idx_folder(tmp_path / "one", seed=1)
    write_idx_folder(tmp_path / "two", seed=2)
    data_dir = tmp_path / "data"
    first = load_split("fashion", "test", data_dir=data_dir, source_dir=tmp_path / "one")
    with pytest.raises(ValueError, match=r"prepared from other files than those now in .*two"):
        load_split("fashion", "test", data_dir=data_dir, source_dir=tmp_path / "two")
    for source_dir in (None, tmp_path / "one"):
        again = load_split("fashion", "test", data_dir=data_dir, source_dir=source_dir)
        np.testing.assert_array_equal(again.images, first.images)


@pytest.mark.parametrize(("name", "layout"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_published_files_round_trip(tmp_path, monkeypatch, name, layout):
    written = write_cifar(tmp_path / "archive", layout, monkeypatch)
    for split, (images, labels) in written.items():
        loaded = load_split(
            name, split, data_dir=tmp_path / "data", source_dir=tmp_path / "archive"
        )
        assert examples(loaded.images, loaded.labels) == examples(images, labels)
        assert (loaded.num_classes, loaded.image_shape) == (CLASSES[layout.archive], (32, 32, 3))
        assert loaded.class_names == tuple(f"class_{n}" for n in range(CLASSES[layout.archive]))


def test_another_cifar_archive_is_not_taken_for_that_prepared(tmp_path, monkeypatch):
    write_cifar(tmp_path / "one", CIFAR10, monkeypatch, seed=1)
    load_split("cifar10", "test", data_dir=tmp_path, source_dir=tmp_path / "one")
    write_cifar(tmp_path / "two", CIFAR10, monkeypatch, seed=2)
    with pytest.raises(ValueError, match=r"prepared from other files than those now in .*two"):
        load_split("cifar10", "test", data_dir=tmp_path, source_dir=tmp_path / "two")


@pytest.mark.parametrize("name", ["cifar10", "fashion"])
def test_damaged_files_prepare_nothing(tmp_path, monkeypatch, name):
    write_idx_folder(tmp_path / "files")
    write_cifar(tmp_path / "files", CIFAR10, monkeypatch)
    for file in (tmp_path / "files").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DatasetFormatError, match="fetch it again"):
        load_split(name, "train", data_dir=tmp_path, source_dir=tmp_path / "files")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("test_size", [1, 7, 50, 199])
def test_shares_are_within_one_and_the_size_exact(seed, test_size):
    labels = np.random.default_rng(seed).choice(4, 200, p=[0.5, 0.3, 0.15, 0.05])
    train, test = stratified_split(labels, test_size=test_size, seed=seed)
    assert len(test) == test_size
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(200))
    shares = np.bincount(labels, minlength=4) * test_size / 200
    assert np.abs(np.bincount(labels[test], minlength=4) - shares).max() < 1


def test_the_seed_alone_decides():
    labels = np.arange(100) % 5
    _, first = stratified_split(labels, test_size=20, seed=1)
    _, again = stratified_split(labels, test_size=20, seed=1)
    _, other = stratified_split(labels, test_size=20, seed=2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_stays_the_same_across_releases():
    """A change here is a change of the data sets: their builders need a new version."""
    _, test = stratified_split(np.arange(1797) % 10, test_size=360, seed=0)
    assert zlib.crc32(test.astype("<i8").tobytes()) == 2894120865


def test_digits_fill_the_scale_and_stay_recoverable():
    from sklearn.datasets import load_digits

    images = np.concatenate([images for images, _ in read_digits().values()])
    np.testing.assert_array_equal(np.unique(images)[[0, -1]], [0, 255])
    recovered = (images[..., 0].astype(int) * 16 + 127) // 255
    originals = load_digits().images.astype(int)
    assert Counter(map(bytes, recovered)) == Counter(map(bytes, originals))


def test_a_changed_package_is_refused(monkeypatch):
    changed = SimpleNamespace(data=np.full((1796, 64), 16.0), target=np.zeros(1796))
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: changed)
    with pytest.raises(RuntimeError, match=r"scikit-learn must carry 1797 .* \[1796, 64\]"):
        read_digits()
