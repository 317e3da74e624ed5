"""The unpickler reads arrays as Python 2 and 3 write them, and refuses whatever could run code."""

import contextlib
import datetime
import os
import pickle

import numpy as np
import pytest
import python2_pickle

from wsbcn_flax.data._pickled_arrays import load_pickled_arrays

VALUES = {
    b"data": np.arange(24, dtype=np.uint8).reshape(4, 6),
    b"labels": [3, 1, 2, 2**40],
    b"nested": {b"names": [b"cat", b"d\xc3\xb6g"], b"long": b"x" * 300, b"pair": (1, None)},
}


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    "content",
    [python2_pickle.dumps(VALUES), *(pickle.dumps(VALUES, protocol) for protocol in (2, 3, 4))],
    ids=["Python 2", "protocol 2", "protocol 3", "protocol 4"],
)
def test_reads_arrays_and_containers(content):
    loaded = load_pickled_arrays(content)
    np.testing.assert_array_equal(loaded.pop(b"data"), VALUES[b"data"])
    assert loaded == {key: value for key, value in VALUES.items() if key != b"data"}


def test_the_pickles_of_these_tests_hold_what_python_2_wrote():
    content = python2_pickle.dumps({b"labels": [6, 9], b"data": VALUES[b"data"]})
    for part in (
        b"U\x06labels",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy\ndtype\n",
        b"U\x02u1",
    ):
        assert part in content


def test_fortran_order():
    values = np.asfortranarray(VALUES[b"data"])
    loaded = load_pickled_arrays(pickle.dumps({"data": values}, 2))
    np.testing.assert_array_equal(loaded["data"], values)


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        (Call(os.system, "exit 1"), r"posix\.system"),
        (Call(eval, "1"), r"builtin.*\.eval"),
        (Call(getattr, "text", "upper"), r"builtin.*\.getattr"),
        (datetime.date(2020, 1, 1), r"datetime\.date"),
        (np.float64(1), r"multiarray\.scalar"),
        (os.path.join, r"posixpath\.join"),
    ],
    ids=["os.system", "eval", "getattr", "date", "scalar", "function"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_refuses_every_other_reference(value, reference, protocol):
    content = pickle.dumps({b"data": value}, protocol)
    with pytest.raises(pickle.UnpicklingError, match=rf"plain containers only.*{reference}"):
        load_pickled_arrays(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a pickle"),
        (b"hello", "not a pickle"),
        (python2_pickle.dumps(VALUES)[:60], "not a pickle .*truncated"),
        (pickle.dumps([1, 2], 2), "must hold a dict, received list"),
        (pickle.dumps({b"data": np.zeros(3)}, 2), "arrays of uint8, received f8"),
        (pickle.dumps({b"data": np.array([[], 1], object)}, 2), "arrays of uint8, received O8"),
    ],
)
def test_rejects(content, message):
    with pytest.raises(pickle.UnpicklingError, match=message):
        load_pickled_arrays(content)


def test_no_byte_of_a_pickle_can_break_out():
    """Whatever one byte becomes, the reader returns or raises its one error."""
    content = python2_pickle.dumps({b"data": VALUES[b"data"], b"labels": [1, 2]})
    rng = np.random.default_rng(0)
    for position in range(2, len(content)):
        damaged = bytearray(content)
        damaged[position] = rng.integers(256)
        with contextlib.suppress(pickle.UnpicklingError):
            load_pickled_arrays(bytes(damaged))
