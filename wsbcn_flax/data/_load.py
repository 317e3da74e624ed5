"""Finds a named dataset on this machine and opens a split of it."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from wsbcn_flax.data._image_folder import load_image_folder, split_folders
from wsbcn_flax.data._prepared_splits import load_prepared
from wsbcn_flax.data._small_datasets import (
    INFO_FILE,
    SMALL_DATASETS,
    DatasetNotFoundError,
    ensure_prepared,
)
from wsbcn_flax.data._sources import EncodedSource, ImageSource

# Datasets that tensorflow-datasets prepares, under its own names.
_TFDS_NAMES = {each: each for each in ("cifar10", "cifar100", "mnist")}
_TFDS_NAMES["imagenet"] = "imagenet2012"


def default_data_dir() -> Path:
    """Returns the folder of datasets used where no ``data_dir`` is given.

    It is ``$WSBCN_FLAX_DATA_DIR`` if set, else ``wsbcn_flax/data`` in ``$XDG_CACHE_HOME``, which
    is ``~/.cache`` if unset.
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
    return tuple(sorted({*SMALL_DATASETS, *_TFDS_NAMES}))


def load_split(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source_dir: str | os.PathLike[str] | None = None,
    prepare: bool = True,
) -> ImageSource | EncodedSource:
    """Loads a split of a dataset, never touching the network.

    All images but ImageNet's are read into memory.

    - "mnist5k" (5,000 images of MNIST) and "digits" (1,797 of 8x8 pixels) come with Python packages
      and are prepared on first use, in seconds; "fashion" is prepared from its idx files.
    - "cifar10", "cifar100" and "mnist" are read if tensorflow-datasets prepared them earlier, in
      the array_record format. Otherwise the CIFARs are prepared from their published archives.
    - "imagenet" (ILSVRC 2012) is read from what tensorflow-datasets prepared as ``imagenet2012``,
      or else from JPEG files ``imagenet/{train,val}/CLASS/*.JPEG``, as torchvision unpacks them.
      Either way classes are the WordNet IDs in order.

    Args:
        name: One of `dataset_names`.
        split: Split in tfds's syntax over "train" and "test" (ImageNet: "validation" or "val"),
            such as ``"train"``, ``"train[:90%]"``, ``"train[4000:]"`` or ``"train+test"``.
        data_dir: Folder of datasets; defaults to `default_data_dir`. Public datasets are also
            looked for in tfds's own default folder.
        source_dir: Folder of the files that a dataset is prepared from, even if tensorflow-datasets
            prepared it: for "fashion" its four gzipped idx files (any in MNIST's format serve), for
            the CIFARs ``cifar-10-python.tar.gz`` or ``cifar-100-python.tar.gz``. Defaults to
            ``downloads/manual`` in ``data_dir``, then for "fashion" to where Debian's package
            dataset-fashion-mnist puts them.
        prepare: False to fail rather than prepare a dataset on first use.

    Returns:
        The split, shuffled once, the same on every machine.

    Raises:
        ValueError: If the name or the split is unknown, the split is empty, ``source_dir`` is not
            what the dataset was prepared from, or the prepared data are not what they should be.
        DatasetFormatError: If an idx file or an archive of CIFAR is not what it should be.
        DatasetNotFoundError: If the data are not on this machine; says how to obtain them.
        ImportError: If a package that carries or reads the data is not installed; names the extra.
        RuntimeError: If the prepared files are damaged.
    """
    if name not in (names := dataset_names()):
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name must be one of {', '.join(names)}; received {name!r}{hint}")
    with_files = [each for each, dataset in SMALL_DATASETS.items() if dataset.files]
    if source_dir is not None and name not in with_files:
        raise ValueError(
            f"source_dir is for {', '.join(map(repr, with_files))} only, received it for {name!r}"
        )
    source = None if source_dir is None else Path(source_dir).expanduser()
    tfds_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    searched = (default_data_dir(), tfds_dir) if data_dir is None else (data_dir,)
    roots = [Path(root).expanduser() for root in searched]
    if name == "imagenet":
        split = re.sub(r"\bval\b", "validation", split)
    if source is None and (folder := _find_public(name, roots)):
        return load_prepared(folder, split, name=name)
    for root in roots if name == "imagenet" else ():
        if split_folders(root / name):
            return load_image_folder(root / name, split, name=name)
    if name not in SMALL_DATASETS:
        raise DatasetNotFoundError(_advice(name, roots))
    try:
        folder = ensure_prepared(name, roots[0], source_dir=source, prepare=prepare)
    except DatasetNotFoundError as error:
        if source is not None or name not in _TFDS_NAMES:
            raise
        raise DatasetNotFoundError(f"{_advice(name, roots)} Without TensorFlow: {error}") from error
    return load_prepared(folder, split, name=name)


def _find_public(name: str, roots: Sequence[Path]) -> Path | None:
    """Returns the newest version that tfds prepared in the first root that has any, or None."""
    for root in roots if name in _TFDS_NAMES else ():
        infos = root.glob(f"{_TFDS_NAMES[name]}/*.*.*/{INFO_FILE}")
        if versions := sorted((each.parent for each in infos), key=_version):
            return versions[-1]
    return None


def _version(folder: Path) -> tuple[int, ...]:
    """Returns the numbers of ``NAME/3.0.2``; (-1,) for tfds's unfinished folders."""
    numbers = folder.name.split(".")
    return tuple(map(int, numbers)) if all(map(str.isdecimal, numbers)) else (-1,)


def _advice(name: str, roots: Sequence[Path]) -> str:
    """Says how to obtain a public dataset that is in none of the roots."""
    where, public, is_imagenet = " or ".join(map(str, roots)), _TFDS_NAMES[name], name == "imagenet"
    build = (
        f"pip install tensorflow tensorflow-datasets && tfds build {public} "
        f"--file_format=array_record {'--manual_dir=TARS ' * is_imagenet}--data_dir=DIR; "
        f"then copy DIR/{public} into {roots[0]}, or pass data_dir=DIR."
    )
    if not is_imagenet:
        return (
            f"the public dataset {name!r} is not prepared in {where}. Preparing it needs "
            f"TensorFlow and the network. On a machine that has both, run: {build}"
        )
    return (
        "ImageNet is neither prepared as imagenet2012 nor unpacked as imagenet/train/CLASS/*.JPEG "
        f"and imagenet/val/CLASS/*.JPEG in {where}. On a machine with internet, get "
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from "
        f"https://image-net.org (after signing in) into a folder TARS. Either run: {build} "
        'Or run: pip install torchvision scipy && python -c "from torchvision.datasets import '
        "ImageNet; ImageNet('TARS', 'train'); ImageNet('TARS', 'val')\"; then move TARS/train and "
        f"TARS/val into {roots[0] / 'imagenet'}."
    )
