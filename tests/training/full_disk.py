"""A simulated full disk."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(size: int):
    """Makes writes fail that would let a file grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
