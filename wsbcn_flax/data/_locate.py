"""Where prepared data sets live, and how to say that one is not there."""

import os
from collections.abc import Sequence
from pathlib import Path

PUBLIC_NAMES = ("cifar10", "cifar100", "mnist")

# tfds writes it into the folder of a version, which gets its name when all else is written.
INFO_FILE = "dataset_info.json"


class DatasetNotFoundError(FileNotFoundError):
    """A known data set is not on this machine; the message says how to get it."""


def default_data_dir() -> Path:
    """The folder of prepared data sets used where no ``data_dir`` is given.

    Returns:
        ``$WSBCN_FLAX_DATA_DIR`` if set, else ``wsbcn_flax/data`` in ``$XDG_CACHE_HOME``, which is
        ``~/.cache`` if unset.
    """
    if chosen := os.environ.get("WSBCN_FLAX_DATA_DIR"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "wsbcn_flax" / "data"


def search_roots(data_dir: Path | None) -> tuple[Path, ...]:
    """Folders of data sets that tensorflow-datasets prepared, the first to look in first.

    Args:
        data_dir: the only one if given; by default `default_data_dir` and then tfds's own folder,
            ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
    """
    return (data_dir,) if data_dir is not None else (default_data_dir(), _tfds_data_dir())


def find_public(name: str, roots: Sequence[Path]) -> Path | None:
    """Finds a public data set that tensorflow-datasets prepared earlier.

    Args:
        name: tfds's name of the data set.
        roots: folders of prepared data sets.

    Returns:
        The folder of the newest version in the first root that has any, or None.
    """
    for root in roots:
        versions = sorted(root.glob(f"{name}/*.*.*/{INFO_FILE}"), key=_version)
        if versions:
            return versions[-1].parent
    return None


def explain_public(name: str, roots: Sequence[Path]) -> str:
    """Says that `find_public` found nothing, and how to prepare the data set."""
    return (
        f"the public data set {name!r} is not prepared in {' or '.join(map(str, roots))}. "
        "Preparing it needs TensorFlow and the network. On a machine that has both, run: "
        f"pip install tensorflow tensorflow-datasets && "
        f"tfds build {name} --file_format=array_record --data_dir=DIR; "
        f"then copy DIR/{name} into {roots[0]}, or pass data_dir=DIR."
    )


def _tfds_data_dir() -> Path:
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _version(info_file: Path) -> tuple[int, ...]:
    """The numbers of ``NAME/3.0.2/dataset_info.json``; (-1,) for tfds's unfinished folders."""
    numbers = info_file.parent.name.split(".")
    return tuple(map(int, numbers)) if all(map(str.isdecimal, numbers)) else (-1,)
