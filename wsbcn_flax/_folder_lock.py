"""One writer of a folder at a time."""

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
    """Keeps other processes from writing to a folder, which is made if absent.

    The file ``.lock`` names the owner. The operating system frees the lock when the owner ends,
    however it ends, so that no stale lock is ever in the way. Of a run in several processes, one
    must lock. On a file system without locks there is a warning.

    Raises:
        FolderInUseError: If another process, or another block of this one, holds the lock.
    """
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
            warnings.warn(f"{folder} cannot be locked: {error}. Start one run there.", stacklevel=3)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        owner = f"process {os.getpid()} on {platform.node()} since {since}"
        with contextlib.suppress(OSError):  # A full disk, which is not for the lock to report.
            os.write(file.fileno(), owner.encode())
        yield
