"""Prepares the data sets that have a builder here, once, in the array_record format."""

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsbcn_flax.data._locate import INFO_FILE, DatasetNotFoundError
from wsbcn_flax.data._source_files import SOURCE_FILES, SourceFiles

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

OWN_NAMES = ("cifar10", "cifar100", "digits", "fashion_mnist", "mnist5k")

_logger = logging.getLogger(__name__)


def ensure_prepared(name: str, data_dir: Path, *, source_dir: Path | None, prepare: bool) -> Path:
    """Prepares a data set unless it is prepared already.

    tfds writes to a folder of its own and renames it when all is written, so a run that is killed
    leaves nothing that looks prepared, and of several processes at once one wins and the others
    take its result.

    Args:
        name: one of `OWN_NAMES`.
        data_dir: folder of prepared data sets.
        source_dir: folder of the source files, for the data sets of `SOURCE_FILES`.
        prepare: False to fail if it is not prepared yet.

    Returns:
        The folder of the prepared version.

    Raises:
        DatasetNotFoundError: if it is not prepared and must not be, or its files are not found.
        ImportError: if it is not prepared and the package that carries it is not installed.
        ValueError: if it was prepared from other files than those in ``source_dir``.
    """
    files = SOURCE_FILES.get(name)
    if files is not None and source_dir is not None:
        _check_complete(files, source_dir)
    builder = _make_builder(name, data_dir)
    if not _is_prepared(builder):
        if not prepare:
            raise DatasetNotFoundError(
                f"{name!r} is not prepared in {data_dir}; pass prepare=True, or another data_dir"
            )
        manual_dir = None if files is None else source_dir or _find(files, name, data_dir)
        _prepare(builder, manual_dir)
        builder = _make_builder(name, data_dir)
    if files is not None and source_dir is not None:
        _check_source(builder, files, source_dir)
    return Path(builder.data_dir)


def _make_builder(name: str, data_dir: Path) -> "tfds.core.DatasetBuilder":
    from wsbcn_flax.data import builders

    classes = {
        "cifar10": builders.Cifar10Python,
        "cifar100": builders.Cifar100Python,
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


def _find(files: SourceFiles, name: str, data_dir: Path) -> Path:
    folders = files.folders(data_dir)
    for folder in folders:
        if not files.missing(folder):
            return folder
    raise DatasetNotFoundError(
        f"{name!r} is prepared from {', '.join(files.names)}, not found in "
        f"{' or '.join(map(str, folders))}. {files.advice} Put what you get into "
        f"{folders[0]}, or pass source_dir=FOLDER."
    )


def _check_complete(files: SourceFiles, source_dir: Path) -> None:
    if missing := files.missing(source_dir):
        raise DatasetNotFoundError(
            f"source_dir must hold {', '.join(files.names)}; {source_dir} lacks "
            f"{', '.join(missing)}"
        )


def _check_source(
    builder: "tfds.core.DatasetBuilder", files: SourceFiles, source_dir: Path
) -> None:
    metadata: Any = builder.info.metadata
    if metadata["source"] != files.fingerprint(source_dir):
        raise ValueError(
            f"{builder.data_dir} was prepared from other files than those now in {source_dir}; "
            "pass another data_dir for these, or delete it"
        )
