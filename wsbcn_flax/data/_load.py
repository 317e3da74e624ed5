"""Finds a named dataset on this machine and opens a split of it."""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsbcn_flax.data import _readers as readers
from wsbcn_flax.data._prepared_splits import find_prepared, load_prepared, resolve_slices
from wsbcn_flax.data._sources import EncodedSource, FileRecords, ImageSource


class DatasetNotFoundError(FileNotFoundError):
    """A known dataset is not on this machine; the message says how to obtain it."""


class _Dataset(NamedTuple):
    """The places to look for a dataset, and the advice if it is in none of them.

    Attributes:
        public: Name under which tensorflow-datasets prepares it; empty if it does not.
        folders: Other folders that may hold it, relative to the data_dir.
        files: Patterns of file names, each of which must match in such a folder.
        read: Function that maps such a folder and a split to the dataset.
        advice: Sentences on how to obtain it, with ``{root}`` for the data_dir.
    """

    public: str = ""
    folders: tuple[str, ...] = ("downloads/manual",)
    files: tuple[str, ...] = ()
    read: Callable[[Path, str], readers.Dataset] | None = None
    advice: str = ""


_BUILD = (
    "On a machine that has TensorFlow and the network, run: "
    "pip install tensorflow tensorflow-datasets && tfds build {0} --file_format=array_record {1}"
    "--data_dir=DIR; then copy DIR/{0} into {{root}}, or pass data_dir=DIR (--data.data-dir DIR)."
)


def _cifar(name: str, archive: str, *, md5: str) -> _Dataset:
    return _Dataset(
        public=name,
        files=(archive,),
        read=lambda folder, _: readers.read_cifar(folder / archive, md5=md5),
        advice=f"Put https://www.cs.toronto.edu/~kriz/{archive} into {{root}}/downloads/manual. "
        f"Or: {_BUILD.format(name, '')}",
    )


# Checksums as https://www.cs.toronto.edu/~kriz/cifar.html gives them.
_CIFAR10_MD5, _CIFAR100_MD5 = "c58f30108f718f92721af3b95e74349a", "eb9058c3a382ffc7106e4002c42a8d85"
DATASETS = {
    "cifar10": _cifar("cifar10", "cifar-10-python.tar.gz", md5=_CIFAR10_MD5),
    "cifar100": _cifar("cifar100", "cifar-100-python.tar.gz", md5=_CIFAR100_MD5),
    "digits": _Dataset(read=lambda *_: readers.read_digits()),
    "fashion": _Dataset(
        folders=("downloads/manual", "/usr/share/datasets/fashion-mnist"),
        files=readers.FASHION_FILES,
        read=lambda folder, _: readers.read_fashion(folder),
        advice="On Debian or Ubuntu run: apt-get install dataset-fashion-mnist. Or put "
        f"{', '.join(readers.FASHION_FILES)} into {{root}}/downloads/manual.",
    ),
    "imagenet": _Dataset(
        public="imagenet2012",
        folders=("imagenet",),
        files=("[tv]*",),
        read=readers.read_image_folder,
        advice="On a machine with internet, get ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar "
        "and ILSVRC2012_devkit_t12.tar.gz from https://image-net.org (after signing in) into a "
        'folder TARS. Then run: pip install torchvision scipy && python -c "from '
        "torchvision.datasets import ImageNet; ImageNet('TARS', 'train'); ImageNet('TARS', 'val')"
        '"; and move TARS/train and TARS/val into {root}/imagenet. Or: '
        + _BUILD.format("imagenet2012", "--manual_dir=TARS "),
    ),
    "mnist": _Dataset(public="mnist", folders=(), advice=_BUILD.format("mnist", "")),
    "mnist5k": _Dataset(read=lambda *_: readers.read_mnist5k()),
}


def default_data_dir() -> Path:
    """Returns the folder of datasets used where no ``data_dir`` is given.

    It is ``$WSBCN_FLAX_DATA_DIR`` if set, else ``wsbcn_flax/data`` in ``$XDG_CACHE_HOME``, which
    defaults to ``~/.cache``.
    """
    if chosen := os.environ.get("WSBCN_FLAX_DATA_DIR"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "wsbcn_flax" / "data"


def dataset_names() -> tuple[str, ...]:
    """Returns the names that `load_split` knows, sorted.

    Example:
        >>> dataset_names()
        ('cifar10', 'cifar100', 'digits', 'fashion', 'imagenet', 'mnist', 'mnist5k')
    """
    return tuple(sorted(DATASETS))


def load_split(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
) -> ImageSource | EncodedSource:
    """Loads a split of a dataset from this machine; nothing is downloaded.

    All datasets but ImageNet are read into memory.

    - "mnist5k" (5,000 images of MNIST) and "digits" (1,797 of 8x8 pixels) come with Python
      packages; "fashion" is read from its four gzipped idx files, which Debian's package
      dataset-fashion-mnist installs; any files in MNIST's format work.
    - "cifar10", "cifar100" and "mnist" are read if tensorflow-datasets prepared them earlier, in
      the array_record format. Otherwise the CIFARs are read from their published archives.
    - "imagenet" (ILSVRC 2012) is read from what tensorflow-datasets prepared as ``imagenet2012``,
      or else from JPEG files ``imagenet/{train,val}/CLASS/*.JPEG``, as torchvision unpacks them.
      Either way, the classes are the WordNet IDs in sorted order.

    Args:
        name: One of `dataset_names`.
        split: Split in tfds's syntax over "train" and "test" (ImageNet: "validation" or "val"),
            such as ``"train"``, ``"train[:90%]"``, ``"train[4000:]"`` or ``"train+test"``.
        data_dir: Folder of datasets; defaults to `default_data_dir`, then tfds's own folder. Files
            published by a dataset's authors are looked for in its ``downloads/manual``.

    Returns:
        The split, in a shuffled order that is the same on every machine.

    Raises:
        ValueError: If the name or the split is unknown, the split is empty, or the prepared files
            are incomplete, damaged or in another format.
        DatasetFormatError: If an idx file or a CIFAR archive is damaged or has other content.
        DatasetNotFoundError: If the data are not on this machine; says how to obtain them.
        ImportError: If a package that carries or reads the data is not installed; names the extra.
        RuntimeError: If prepared files are damaged, or a package changed its data.
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name must be one of {', '.join(DATASETS)}; received {name!r}{hint}")
    of_tfds = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    roots = [default_data_dir(), Path(of_tfds)] if data_dir is None else [Path(data_dir)]
    roots, dataset = [root.expanduser() for root in roots], DATASETS[name]
    split = re.sub(r"\bval\b", "validation", split)
    for root in roots:
        if dataset.public and (folder := find_prepared(root / dataset.public)):
            return load_prepared(folder, split, name=name)
        for folder in (root / each for each in dataset.folders):
            if dataset.read and all(any(folder.glob(pattern)) for pattern in dataset.files):
                return _take(folder, *dataset.read(folder, split), split, name=name)
    where, advice = " or ".join(map(str, roots)), dataset.advice.format(root=roots[0])
    raise DatasetNotFoundError(f"The dataset {name!r} is not in {where}. {advice}")


def _take(
    folder: Path, splits: readers.Splits, class_names: tuple[str, ...], split: str, *, name: str
) -> ImageSource | EncodedSource:
    """Returns a split, in tfds's syntax, of images or of the named files in ``folder``."""
    sizes = {each: len(labels) for each, (_, labels) in splits.items()}
    slices = resolve_slices(split, sizes, dataset=name)
    # The order is shuffled, so that a slice holds all classes. NumPy has frozen RandomState's
    # stream for good; default_rng's may change with a release.
    order = {each: np.random.RandomState(0).permutation(size) for each, size in sizes.items()}
    images, labels = (
        np.concatenate([splits[each][kind][order[each][part]] for each, part in slices])
        for kind in (0, 1)
    )
    described: Any = {"num_classes": len(class_names), "name": name, "class_names": class_names}
    if images.dtype != np.uint8:
        return EncodedSource(records=FileRecords(folder, images, labels), **described)
    return ImageSource(images=images, labels=labels.astype(np.int32), **described)
