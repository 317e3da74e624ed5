"""Reader of pickled dicts of uint8 arrays that runs no code."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np


def load_pickled_arrays(content: bytes) -> dict[Any, Any]:
    """Unpickles a dict of uint8 arrays, containers, numbers and strings, and refuses all else.

    A pickle names the functions that rebuild what it holds, and could name any. This reader calls
    none of them: it stands in for the few that rebuild a numpy array, as Python 2 and 3 and numpy 1
    and 2 name them, and reads the array off their arguments.

    Args:
        content: a pickle; strings of Python 2 become bytes.

    Returns:
        The dict, its arrays read-only.

    Raises:
        pickle.UnpicklingError: if the content is damaged, refers to anything else, or is not a
            dict.
    """
    try:
        loaded = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _RefusedError:
        raise
    except Exception as error:  # the unpickler raises whatever the damage leads to
        raise pickle.UnpicklingError(f"not a pickle ({error!r}); fetch it again") from error
    if not isinstance(loaded, dict):
        raise pickle.UnpicklingError(f"must hold a dict, received {type(loaded).__name__}")
    return {
        key: value.values if isinstance(value, _Array) else value for key, value in loaded.items()
    }


class _RefusedError(pickle.UnpicklingError):
    """A whole pickle of something else."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _RefusedError(
                f"must hold uint8 arrays and plain containers only, received a reference to "
                f"{module}.{name}, which could run code"
            )
        return _STAND_INS[module, name]


class _Dtype:
    """Stands in for a call of ``numpy.dtype``."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Ignores the byte order: bytes have none."""


class _Array:
    """Stands in for a call of numpy's ``_reconstruct``, which makes an array to be filled."""

    values: np.ndarray | None = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, is_fortran, content = state
        if dtype.name != "u1":
            raise _RefusedError(f"must hold arrays of uint8, received {dtype.name}")
        self.values = np.frombuffer(content, np.uint8).reshape(
            shape, order="F" if is_fortran else "C"
        )


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, by which Python 3 writes bytes for Python 2."""
    return text.encode(encoding)


_STAND_INS: dict[tuple[str, str], Callable[..., object] | None] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _encode,
}
