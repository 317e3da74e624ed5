"""The files of data sets that are prepared from files, and where they are looked for."""

import dataclasses
import hashlib
import os
from pathlib import Path

from wsbcn_flax.data._cifar import CIFAR10, CIFAR100
from wsbcn_flax.data._idx_folder import IDX_FILES

_CIFAR_SITE = "https://www.cs.toronto.edu/~kriz/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """Files that are together in one folder.

    Attributes:
        names: of the files.
        advice: how to get them.
        elsewhere: folders that may hold them, besides ``downloads/manual`` in the data_dir.
    """

    names: tuple[str, ...]
    advice: str
    elsewhere: tuple[Path, ...] = ()

    def missing(self, folder: str | os.PathLike[str]) -> list[str]:
        """Names of the files that ``folder`` lacks."""
        return [name for name in self.names if not Path(folder, name).is_file()]

    def fingerprint(self, folder: str | os.PathLike[str]) -> str:
        """SHA-256 over the contents of the files, to tell one source from another."""
        digest = hashlib.sha256()
        for name in self.names:
            with Path(folder, name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def folders(self, data_dir: Path) -> tuple[Path, ...]:
        """Where to look for the files, the first place first."""
        return (data_dir / "downloads" / "manual", *self.elsewhere)


SOURCE_FILES: dict[str, SourceFiles] = {
    "fashion_mnist": SourceFiles(
        names=IDX_FILES,
        advice="On Debian or Ubuntu run: apt-get install dataset-fashion-mnist.",
        elsewhere=(Path("/usr/share/datasets/fashion-mnist"),),
    ),
    "cifar10": SourceFiles(
        names=(CIFAR10.archive,),
        advice=f"Its authors publish it at {_CIFAR_SITE}{CIFAR10.archive}.",
    ),
    "cifar100": SourceFiles(
        names=(CIFAR100.archive,),
        advice=f"Its authors publish it at {_CIFAR_SITE}{CIFAR100.archive}.",
    ),
}
