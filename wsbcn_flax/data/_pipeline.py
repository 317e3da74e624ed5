"""Batches from any source of examples: endless and shuffled, or once through in order.

A batch is a pure function of its step, read from a grain `MapDataset`, so that threads, restarts
and the number of hosts change nothing. Transforms of an example draw from a generator of their own
for each place in the stream. Transforms of a batch draw for the whole global batch, of which a host
keeps its own rows: drawing is cheap and touching pixels is not.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from wsbcn_flax._extras import require

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Random access to examples, dicts of arrays, from several threads at once.

    A source that also has ``take(indices)``, which returns a dict of stacked arrays, is read a
    batch at a time if single examples are not transformed. Messages use an attribute ``name``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    example: Sequence[Any] = (),
    batch: Sequence[Any] = (),
    start_step: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    num_threads: int = 1,
) -> "grain.DatasetIterator[Batch]":
    """Makes endless shuffled batches that depend on the seed and the step alone.

    Batch k is the same for any number of threads, and whether the iterator started at step 0 or at
    k. Host h of H gets rows ``h * B / H`` to ``(h + 1) * B / H`` of it, for any H, and reads no
    other examples.

    Every epoch is a new permutation of the source. Epochs are laid end to end before they are cut
    into batches: no example is dropped, and a batch may hold the end of one epoch and the beginning
    of the next.

    A transform has grain's method ``map(element)`` or ``random_map(element, rng)``. Random
    transforms of a batch must draw with ``size=(rows, ...)``.

    Args:
        source: Examples to train on.
        batch_size: Global batch size B; at most the size of the source.
        seed: Seed of the order and of the random transforms, ``>= 0``.
        example: Transforms of single examples, in order.
        batch: Transforms of whole batches, in order.
        start_step: Number of the first batch. To resume, pass the number of steps done.
        host_index: Index of this host, as `jax.process_index` gives it.
        host_count: Number of hosts H, a divisor of ``batch_size``.
        num_threads: Threads that make examples, while one more or two put batches together. One
            is best for small images in memory, one for each core for encoded images. 0 makes
            batches in the thread that asks for them.

    Returns:
        Iterator of dicts of arrays ``[B / H, ...]``. Call its ``close()`` (or use
        `contextlib.closing`) to stop its threads early.

    Raises:
        ValueError: If an argument breaks a rule above; while iterating, if an example is damaged.
        ImportError: If grain is not installed; names the extra.

    Example:
        >>> import contextlib
        >>> import numpy as np
        >>> numbers = [{"x": np.float32(number)} for number in range(4)]
        >>> with contextlib.closing(train_batches(numbers, batch_size=2, seed=0)) as batches:
        ...     epoch = [next(batches)["x"] for _ in range(2)]
        >>> sorted(np.concatenate(epoch).tolist())
        [0.0, 1.0, 2.0, 3.0]
    """
    if batch_size > len(source):
        raise ValueError(
            f"batch_size must be at most the {len(source)} examples of {_name(source)}, or a batch "
            f"would hold one twice; received {batch_size}"
        )
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must be >= 0, received {seed} and {start_step}")
    grain = require("grain", extra="train")
    rows = _host_rows(batch_size, host_index, host_count)
    order_seed, example_seed, batch_seed = map(int, np.random.SeedSequence(seed).generate_state(3))
    order = grain.MapDataset.range(len(source)).seed(order_seed).shuffle().repeat()
    read = _reader(source, order, example, seed=example_seed, num_threads=num_threads)

    def read_rows(step: int) -> Batch:
        start = step * batch_size
        return read(range(start + rows.start, start + rows.stop))

    steps = grain.MapDataset.range(sys.maxsize // batch_size).seed(batch_seed)
    draw_rows = functools.partial(_RowsOfDraws, batch_size, rows)
    iterator = _iterate(_apply(steps, read_rows, batch, draw_rows), num_threads)
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    example: Sequence[Any] = (),
    batch: Sequence[Any] = (),
    host_index: int = 0,
    host_count: int = 1,
    num_threads: int = 1,
) -> "grain.DatasetIterator[Batch]":
    """Reads a source once, in order, in batches of one shape.

    The last batch is filled up with zeros that have mask 0, so that a jitted step compiles once.
    Sums weighted by the mask are exact. Every host gets the same number of batches.

    Args:
        source: Examples to evaluate on.
        batch_size: Global batch size B; may exceed the size of the source.
        example: Transforms of single examples, in order; none may be random.
        batch: Transforms of whole batches, in order; none may be random.
        host_index: Index of this host, as in `train_batches`.
        host_count: Number of hosts H, a divisor of ``batch_size``.
        num_threads: Threads that make examples, as in `train_batches`.

    Returns:
        Iterator of dicts of arrays ``[B / H, ...]``, and under ``"mask"`` float32 ``[B / H]``: 1
        for an example and 0 for filling.

    Raises:
        ValueError: If an argument breaks a rule above; while iterating, if an example is damaged.
        ImportError: If grain is not installed; names the extra.

    Example:
        >>> import numpy as np
        >>> numbers = [{"x": np.int32(number)} for number in range(3)]
        >>> for batch in eval_batches(numbers, batch_size=2):
        ...     print(batch["x"], batch["mask"])
        [0 1] [1. 1.]
        [2 0] [1. 0.]
    """
    grain = require("grain", extra="train")
    rows = _host_rows(batch_size, host_index, host_count)
    count, size = len(source), rows.stop - rows.start
    read = _reader(source, range(count), example, num_threads=num_threads)

    def positions(step: int) -> range:
        return range(count)[step * batch_size :][rows]

    def read_rows(step: int) -> Batch:
        return read(positions(step) or range(1))  # An example shows the shape of the filling.

    def fill(step: int, values: Batch) -> Batch:
        valid = len(positions(step))
        mask = (np.arange(size) < valid).astype(np.float32)
        return {key: _pad(value[:valid], size) for key, value in values.items()} | {"mask": mask}

    steps = grain.MapDataset.range(math.ceil(count / batch_size))
    return _iterate(_apply(steps, read_rows, batch).map_with_index(fill), num_threads)


def _host_rows(batch_size: int, host_index: int, host_count: int) -> slice:
    """Returns the rows of a global batch that one host gets."""
    if not 0 <= host_index < host_count:
        raise ValueError(
            f"host_index must be in [0, host_count), received {host_index} of {host_count} hosts"
        )
    if batch_size < 1 or batch_size % host_count:
        raise ValueError(
            "batch_size must be a positive multiple of the number of hosts, received "
            f"{batch_size} for {host_count}"
        )
    size = batch_size // host_count
    return slice(host_index * size, (host_index + 1) * size)


def _reader(
    source: Any, order: Any, example: Sequence[Any], *, num_threads: int, seed: int | None = None
) -> Callable[[range], Batch]:
    """Returns a function that reads the examples at positions of ``order`` into a batch."""
    if not example and hasattr(source, "take"):
        return lambda positions: source.take([order[position] for position in positions])
    places = require("grain", extra="train").MapDataset.source(order)
    places = places if seed is None else places.seed(seed)
    examples = _apply(places, source.__getitem__, example)

    def write(batch: Batch, first: dict[str, Any], positions: range, row: int) -> None:
        try:
            values = {key: np.asarray(value) for key, value in examples[positions[row]].items()}
        except ValueError as error:
            index = order[positions[row]]
            raise ValueError(f"record {index} of {_name(source)}: {error}") from error
        layout = {key: (value.dtype.str, *value.shape) for key, value in values.items()}
        # Threads may meet here: `setdefault` takes the layout, and the arrays, of one.
        if layout != (expected := first.setdefault("layout", layout)):
            raise ValueError(
                "examples must have the same keys, dtypes and shapes in a batch, received "
                f"{expected} and {layout}; decode, crop or pad them by a transform of examples"
            )
        for key, value in values.items():
            if key not in batch:
                batch.setdefault(key, np.empty((len(positions), *value.shape), value.dtype))
            batch[key][row] = value

    def read(positions: range) -> Batch:
        batch: Batch = {}
        # A pool for each batch leaves no threads to be stopped, and they start in microseconds.
        with ThreadPoolExecutor(max(1, num_threads)) as pool:
            run = pool.map if num_threads else map
            list(run(functools.partial(write, batch, {}, positions), range(len(positions))))
        return batch

    return read


def _apply(
    dataset: Any, read: Any, transforms: Sequence[Any], limit: Callable[..., Any] = lambda r: r
) -> Any:
    """Reads elements and transforms them, with generators that ``limit`` wraps, by one grain map.

    A map of its own for each transform would take tens of microseconds for each element.
    """
    is_random = [hasattr(transform, "random_map") for transform in transforms]

    def run(element: Any, rng: Any = None) -> Any:
        element = read(element)
        for transform, random in zip(transforms, is_random, strict=True):
            element = transform.random_map(element, rng) if random else transform.map(element)
        return element

    if any(is_random):
        return dataset.random_map(lambda element, rng: run(element, limit(rng)))
    return dataset.map(run)


@dataclasses.dataclass(frozen=True)
class _RowsOfDraws:
    """A generator that draws for the global batch and returns the rows of one host."""

    batch_size: int
    rows: slice
    rng: np.random.Generator

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def draw(*args: Any, size: Any = None, **options: Any) -> Any:
            if size is None:
                return getattr(self.rng, name)(*args, **options)
            _, *rest = np.atleast_1d(size)
            whole = getattr(self.rng, name)(*args, size=(self.batch_size, *rest), **options)
            return whole[self.rows]

        return draw


def _pad(values: np.ndarray, size: int) -> np.ndarray:
    """Adds zeros at the end of the first axis up to ``size``."""
    zeros = np.zeros((size - len(values), *values.shape[1:]), values.dtype)
    return np.concatenate([values, zeros]) if len(zeros) else values


def _iterate(batches: Any, num_threads: int) -> Any:
    """Makes batches ahead in threads."""
    grain = require("grain", extra="train")
    if num_threads < 0:
        raise ValueError(f"num_threads must be >= 0, received {num_threads}")
    # Two batches are in the making: while one is transformed as a whole, `num_threads` threads of
    # `_reader` make the examples of the other.
    ahead = min(num_threads, 2)
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead + 1)
    return iter(batches.to_iter_dataset(options))


def _name(source: object) -> str:
    return getattr(source, "name", type(source).__name__)
