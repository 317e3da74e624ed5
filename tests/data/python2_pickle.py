"""A pickler that writes what Python 2 and its numpy wrote, as the archives of CIFAR hold it."""

import io
import pickle
import struct
from typing import Any, ClassVar

import numpy as np


def _reconstruct():
    """Pickled by the name of numpy's function."""


class Python2Pickler(pickle._Pickler):
    """Writes bytes as strings of Python 2, and uint8 arrays by numpy's names of that time."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)
    names: ClassVar[dict[Any, bytes]] = {
        _reconstruct: b"numpy.core.multiarray\n_reconstruct\n",
        np.dtype: b"numpy\ndtype\n",
        np.ndarray: b"numpy\nndarray\n",
    }

    def save_bytes(self, obj):
        short = len(obj) < 256
        header = pickle.SHORT_BINSTRING if short else pickle.BINSTRING
        self.write(header + struct.pack("<B" if short else "<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch[bytes] = save_bytes

    def save_global(self, obj, name=None):
        if obj not in self.names:
            return super().save_global(obj, name)
        self.write(pickle.GLOBAL + self.names[obj])
        return self.memoize(obj)

    dispatch[type] = dispatch[type(_reconstruct)] = save_global

    def reducer_override(self, obj):
        if isinstance(obj, np.ndarray):
            state = (1, obj.shape, obj.dtype, False, obj.tobytes())
            return _reconstruct, (np.ndarray, (0,), b"b"), state
        if isinstance(obj, np.dtype):
            return np.dtype, (obj.str[1:].encode(), 0, 1), (3, b"|", None, None, None, -1, -1, 0)
        return NotImplemented


def dumps(values: Any) -> bytes:
    """The pickle of ``values`` in protocol 2."""
    content = io.BytesIO()
    Python2Pickler(content, protocol=2).dump(values)
    return content.getvalue()
