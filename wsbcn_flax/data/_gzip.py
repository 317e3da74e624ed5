"""Reader of whole gzip files."""

import gzip
import zlib
from pathlib import Path


def read_gzip(path: Path, *, error: type[ValueError]) -> bytes:
    """Decompresses a file whose checksum and length must be right.

    Args:
        path: the ``.gz`` file.
        error: what to raise if it is not a whole gzip file.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as cause:
        raise error(f"{path}: not a whole gzip file ({cause}); fetch it again") from cause
