"""Prepares the data sets that have a builder here, once, in the array_record format."""

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsbcn_flax.data._idx_folder import IDX_FILES, idx_fingerprint, missing_idx_files
from wsbcn_flax.data._locate import INFO_FILE, DatasetNotFoundError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

OWN_NAMES = ("digits", "fashion_mnist", "mnist5k")

_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_logger = logging.getLogger(__name__)


def ensure_prepared(name: str, data_dir: Path, *, source_dir: Path | None, prepare: bool) -> Path:
    """Prepares a data set unless it is prepared already.

    tfds writes to a folder of its own and renames it when all is written, so a run that is killed
    leaves nothing that looks prepared, and of several processes at once one wins and the others
    take its result.

    Args:
        name: one of `OWN_NAMES`.
        data_dir: folder of prepared data sets.
        source_dir: folder of the idx files, for "fashion_mnist".
        prepare: False to fail if it is not prepared yet.

    Returns:
        The folder of the prepared version.

    Raises:
        DatasetNotFoundError: if it is not prepared and must not be, or its files are not found.
        ImportError: if it is not prepared and the package that carries it is not installed.
        ValueError: if it was prepared from other files than those in ``source_dir``.
    """
    if source_dir is not None:
        _check_idx_files(source_dir)
    builder = _make_builder(name, data_dir)
    if not _is_prepared(builder):
        if not prepare:
            raise DatasetNotFoundError(
                f"{name!r} is not prepared in {data_dir}; pass prepare=True, or another data_dir"
            )
        manual_dir = _find_idx_files(source_dir, data_dir) if name == "fashion_mnist" else None
        _prepare(builder, manual_dir)
        builder = _make_builder(name, data_dir)
    if source_dir is not None:
        _check_source(builder, source_dir)
    return Path(builder.data_dir)


def _make_builder(name: str, data_dir: Path) -> "tfds.core.DatasetBuilder":
    from wsbcn_flax.data import builders

    classes = {
        "digits": builders.Digits,
        "fashion_mnist": builders.FashionMnistIdx,
        "mnist5k": builders.Mnist5k,
    }
    return classes[name](data_dir=data_dir)


def _prepare(builder: "tfds.core.DatasetBuilder", manual_dir: Path | None) -> None:
    import tensorflow_datasets as tfds

    _logger.info("preparing %s in %s", builder.name, builder.data_dir)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    try:
        with _silence():
            builder.download_and_prepare(file_format="array_record", download_config=config)
    except OSError:
        # The final rename fails if another process has prepared the same data meanwhile.
        if not _is_prepared(builder):
            raise
    if not _is_prepared(builder):
        raise RuntimeError(
            f"{builder.data_dir} exists but does not hold a whole data set; delete it"
        )


def _is_prepared(builder: "tfds.core.DatasetBuilder") -> bool:
    """As ``builder.is_prepared()``, which logs a warning where the answer is no."""
    return Path(builder.data_dir, INFO_FILE).is_file()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps tfds from reporting a download that does not happen, and its progress bars."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def _find_idx_files(source_dir: Path | None, data_dir: Path) -> Path:
    if source_dir is not None:
        return source_dir
    candidates = (data_dir / "downloads" / "manual", _DEBIAN_FASHION_MNIST)
    for folder in candidates:
        if not missing_idx_files(folder):
            return folder
    raise DatasetNotFoundError(
        f"the files of 'fashion_mnist' are neither in {candidates[0]} nor in {candidates[1]}. "
        "On Debian or Ubuntu run: apt-get install dataset-fashion-mnist. Elsewhere put "
        f"{', '.join(IDX_FILES)} into the first folder, or pass source_dir=FOLDER."
    )


def _check_idx_files(source_dir: Path) -> None:
    if missing := missing_idx_files(source_dir):
        raise DatasetNotFoundError(
            f"source_dir must hold {', '.join(IDX_FILES)}; {source_dir} lacks {', '.join(missing)}"
        )


def _check_source(builder: "tfds.core.DatasetBuilder", source_dir: Path) -> None:
    metadata: Any = builder.info.metadata
    if metadata["source"] != idx_fingerprint(source_dir):
        raise ValueError(
            f"{builder.data_dir} was prepared from other files than those now in {source_dir}; "
            "pass another data_dir for these, or delete it"
        )
