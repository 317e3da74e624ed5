"""Datasets in memory hold exactly the pixels of their source, in an order that never changes."""

import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from source_files import CLASSES, write_cifar, write_idx_folder

from wsbcn_flax.data import DatasetFormatError, load_split
from wsbcn_flax.data._readers import read_digits, read_mnist5k, stratified_split

SOURCES = {"mnist5k": (read_mnist5k, 4000, 1000), "digits": (read_digits, 1437, 360)}


def examples(images: np.ndarray, labels: np.ndarray) -> Counter[tuple[bytes, int]]:
    """Returns the content of a split in a canonical order."""
    return Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


@pytest.fixture(params=sorted(SOURCES))
def packaged(request):
    """The source arrays and the loaded splits of one packaged dataset."""
    read, *sizes = SOURCES[request.param]
    splits = [load_split(request.param, split) for split in ("train", "test")]
    arrays = [np.concatenate(each) for each in zip(*read()[0].values(), strict=True)]
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


def test_the_order_stays_the_same_across_releases():
    """A change here changes the results of every seed."""
    labels = load_split("digits", "train").labels
    assert zlib.crc32(labels.astype("<i4").tobytes()) == 83604020


def test_slices_hold_their_share_of_every_class():
    counts = np.bincount(load_split("digits", "train[:50%]").labels)
    # A class has about 72 of 718 samples, with standard deviation 6.
    assert np.abs(counts - 72).max() < 3 * 6


def test_idx_files_round_trip(tmp_path):
    written = write_idx_folder(tmp_path / "downloads" / "manual")
    for split, (images, labels) in written.items():
        loaded = load_split("fashion", split, data_dir=tmp_path)
        assert examples(loaded.images, loaded.labels) == examples(images, labels)
        assert loaded.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("name", CLASSES)
def test_published_files_round_trip(tmp_path, monkeypatch, name):
    written = write_cifar(tmp_path / "downloads" / "manual", name, monkeypatch)
    for split, (images, labels) in written.items():
        loaded = load_split(name, split, data_dir=tmp_path)
        assert examples(loaded.images, loaded.labels) == examples(images, labels)
        assert (loaded.num_classes, loaded.image_shape) == (CLASSES[name], (32, 32, 3))
        assert loaded.class_names == tuple(f"class_{n}" for n in range(CLASSES[name]))


@pytest.mark.parametrize("name", ["cifar10", "fashion"])
def test_damaged_files_are_named(tmp_path, monkeypatch, name):
    folder = tmp_path / "downloads" / "manual"
    write_idx_folder(folder)
    write_cifar(folder, "cifar10", monkeypatch)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DatasetFormatError, match=r"manual/.*\.gz must .*fetch it again"):
        load_split(name, "train", data_dir=tmp_path)


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
    """A change here changes the datasets."""
    _, test = stratified_split(np.arange(1797) % 10, test_size=360, seed=0)
    assert zlib.crc32(test.astype("<i8").tobytes()) == 2894120865


def test_digits_fill_the_scale_and_stay_recoverable():
    from sklearn.datasets import load_digits

    images = np.concatenate([images for images, _ in read_digits()[0].values()])
    np.testing.assert_array_equal(np.unique(images)[[0, -1]], [0, 255])
    recovered = (images[..., 0].astype(int) * 16 + 127) // 255
    originals = load_digits().images.astype(int)
    assert Counter(map(bytes, recovered)) == Counter(map(bytes, originals))


@pytest.mark.parametrize("change", ["pixels", "label", "order"])
def test_a_changed_package_is_refused(monkeypatch, change):
    from sklearn.datasets import load_digits

    digits = load_digits()
    if change == "pixels":
        digits.data[5, 7] += 1
    if change == "label":
        digits.target[5] += 1
    if change == "order":
        digits.data, digits.target = digits.data[::-1], digits.target[::-1]
    changed = SimpleNamespace(data=digits.data, target=digits.target)
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: changed)
    with pytest.raises(RuntimeError, match=r"scikit-learn must carry .* received 1797 images with"):
        read_digits()
