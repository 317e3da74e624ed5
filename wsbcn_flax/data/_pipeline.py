"""Batches from any source of examples: endless and shuffled, or a single pass in order.

A batch is a pure function of its step, so threads, restarts and the number of hosts change nothing.
Transforms of an example draw from a separate generator for each place in the stream. Transforms of
a batch draw for the whole global batch, and each host keeps the draws for its own rows. Drawing is
cheap; touching pixels is not.
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
    """A sequence of examples, dicts of arrays, that several threads may read at once.

    A source may also have ``take(indices)``, which returns a dict of stacked arrays. It is called
    for a whole batch if no transform of single examples is given. Error messages use the attribute
    ``name``, if there is one.
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
    """Makes endless shuffled batches that depend only on the seed and the step.

    Batch k is the same for any number of threads, and whether the iterator started at step 0 or at
    k. Host h of H gets rows ``h * B / H`` to ``(h + 1) * B / H`` of the batch, for any H. It reads
    no other examples. Every epoch is a new permutation of the source. Epochs are laid end to end
    before they are cut into batches, so that no example is dropped.

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
        num_threads: Number of threads that make examples; one or two more assemble batches. Use 1
            for small images in memory and one for each core for encoded images. 0 makes batches in
            the calling thread.

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
    rows = _host_rows(batch_size, host_index, host_count)
    if batch_size > len(source):
        raise ValueError(
            f"batch_size must be at most the {len(source)} examples of the source, or a batch "
            f"would hold one twice; received {batch_size}"
        )
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must be >= 0, received {seed} and {start_step}")
    order_seed, example_seed, batch_seed = map(int, np.random.SeedSequence(seed).generate_state(3))
    read = _Reader(source, example, num_threads, example_seed)

    @functools.lru_cache(maxsize=2)  # A batch may span two epochs.
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((order_seed, epoch)).permutation(len(source))

    def make(step: int) -> Batch:
        places = range(step * batch_size, (step + 1) * batch_size)[rows]
        indices = [int(order(place // len(source))[place % len(source)]) for place in places]
        rng = _RowsOfDraws(batch_size, rows, np.random.default_rng((batch_seed, step)))
        return _transform(read(indices, places), batch, rng)

    iterator = _iterate(make, sys.maxsize // batch_size, num_threads)
    require("grain", extra="train").experimental.set_next_index(iterator, start_step)
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

    The last batch is padded with zeros that have mask 0, so that a jitted step compiles once.
    Sums weighted by the mask are exact. Every host gets the same number of batches.

    Args:
        source: Examples to evaluate on.
        batch_size: Global batch size B; may exceed the size of the source.
        example: Transforms of single examples, in order; none may be random.
        batch: Transforms of whole batches, in order; none may be random.
        host_index: Index of this host, as in `train_batches`.
        host_count: Number of hosts H, a divisor of ``batch_size``.
        num_threads: Number of threads that make examples, as in `train_batches`.

    Returns:
        Iterator of dicts of arrays ``[B / H, ...]``, and under ``"mask"`` float32 ``[B / H]``: 1
        for an example and 0 for padding.

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
    rows = _host_rows(batch_size, host_index, host_count)
    if random := [each for each in (*example, *batch) if hasattr(each, "random_map")]:
        raise ValueError(f"transforms for evaluation must not be random, received {random[0]}")
    count, size = len(source), rows.stop - rows.start
    read = _Reader(source, example, num_threads)

    def make(step: int) -> Batch:
        indices = range(count)[step * batch_size :][rows]
        # A host without examples reads one for the shape of the padding.
        values, valid = _transform(read(indices or [0], indices or [0]), batch), len(indices)
        mask = (np.arange(size) < valid).astype(np.float32)
        return {key: _pad(value[:valid], size) for key, value in values.items()} | {"mask": mask}

    return _iterate(make, math.ceil(count / batch_size), num_threads)


def _host_rows(batch_size: int, host_index: int, host_count: int) -> slice:
    """Returns the rows of a global batch that one host gets."""
    if not 0 <= host_index < host_count or batch_size < 1 or batch_size % host_count:
        raise ValueError(
            "host_index must be in [0, host_count) and batch_size a positive multiple of "
            f"host_count, received host {host_index} of {host_count} and {batch_size}"
        )
    size = batch_size // host_count
    return slice(host_index * size, (host_index + 1) * size)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A reader of transformed examples, each with a generator that depends on its place."""

    source: Any
    transforms: Sequence[Any]
    num_threads: int
    seed: int | None = None

    def __call__(self, indices: Sequence[int], places: Sequence[int]) -> Batch:
        """Stacks the examples at ``indices``; ``places`` are their places in the stream."""
        if not self.transforms and hasattr(self.source, "take"):
            return self.source.take(indices)
        # Stacking finished examples instead takes a tenth more CPU time, in page faults.
        batches: list[Batch] = []

        def write(row: int) -> None:
            example = self.read_one(indices[row], places[row])
            if not batches:  # Threads may race here; all use the first of their batches.
                shapes = {key: (len(indices), *value.shape) for key, value in example.items()}
                batches.append({key: np.empty(shapes[key], example[key].dtype) for key in shapes})
            rows = {key: value[row] for key, value in batches[0].items()}
            layouts = [{k: (str(v.dtype), *v.shape) for k, v in e.items()} for e in (rows, example)]
            if layouts[0] != layouts[1]:
                raise ValueError(
                    "examples must have the same keys, dtypes and shapes in a batch, received "
                    f"{layouts[0]} and {layouts[1]}; decode, crop or pad them by a transform"
                )
            for key, value in example.items():
                batches[0][key][row] = value

        # A pool for each batch leaves no threads to stop; threads start in microseconds.
        if self.num_threads:
            with ThreadPoolExecutor(self.num_threads) as pool:
                list(pool.map(write, range(len(indices))))
        else:
            list(map(write, range(len(indices))))
        return batches[0]

    def read_one(self, index: int, place: int) -> Batch:
        rng = None if self.seed is None else np.random.default_rng((self.seed, place))
        try:
            example = _transform(self.source[index], self.transforms, rng)
        except ValueError as error:
            name = getattr(self.source, "name", "the source")
            raise ValueError(f"record {index} of {name}: {error}") from error
        return {key: np.asarray(value) for key, value in example.items()}


def _transform(element: Any, transforms: Sequence[Any], rng: Any = None) -> Any:
    for transform in transforms:
        is_random = hasattr(transform, "random_map")
        element = transform.random_map(element, rng) if is_random else transform.map(element)
    return element


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


def _iterate(make: Callable[[int], Batch], steps: int, num_threads: int) -> Any:
    """Returns an iterator of batches, which threads make ahead of time."""
    if num_threads < 0:
        raise ValueError(f"num_threads must be >= 0, received {num_threads}")
    # Two batches are made at once: while one is transformed as a whole, `num_threads` threads of
    # `_Reader` make the examples of the other.
    grain, ahead = require("grain", extra="train"), min(num_threads, 2)
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead + 1)
    return iter(grain.MapDataset.range(steps).map(make).to_iter_dataset(options))
