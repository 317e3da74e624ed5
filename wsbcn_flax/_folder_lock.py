"""A lock that gives a folder one writer at a time."""

import contextlib
import fcntl
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path


class FolderInUseError(RuntimeError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a folder for one writer; creates the folder if it is absent.

    The file ``.lock`` names the owner. The operating system frees the lock when the owner ends,
    however it ends, so a lock is never stale. In a run of several processes, only one may lock the
    folder. A file system without locks causes a warning.

    Raises:
        FolderInUseError: If another process, or another block in this process, holds the lock.
    """
    if folder.is_file():
        raise NotADirectoryError(f"The folder of a run must not be a file, received {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            raise FolderInUseError(
                f"A folder has one writer at a time, and {folder} is in use by {owner}. Wait for "
                "it or stop it, or choose another folder."
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked: {error}. Start only one run there.", stacklevel=3
            )
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        owner = f"process {os.getpid()} on {platform.node()} since {since}"
        with contextlib.suppress(OSError):  # A full disk is not reported here.
            os.write(file.fileno(), owner.encode())
        yield
