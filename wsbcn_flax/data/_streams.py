"""What all streams of batches share: the order, the share of each host, filling, and threads."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from wsbcn_flax.data._encoded_split import EncodedSplit
from wsbcn_flax.data._split import ImageSplit

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


def host_rows(batch_size: int, host_index: int, host_count: int) -> slice:
    """The rows of a global batch that one host gets.

    Raises:
        ValueError: if there is no such host, or the hosts do not divide the batch.
    """
    if not 0 <= host_index < host_count:
        raise ValueError(
            f"host_index must be in [0, host_count), got {host_index} of {host_count} hosts"
        )
    if batch_size < 1 or batch_size % host_count:
        raise ValueError(
            "batch_size must be a positive multiple of the number of hosts, got "
            f"{batch_size} for {host_count}"
        )
    size = batch_size // host_count
    return slice(host_index * size, (host_index + 1) * size)


def training_stream(
    split: ImageSplit | EncodedSplit,
    make_batch: Callable[[np.ndarray, np.random.Generator], Batch],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_threads: int,
) -> "grain.DatasetIterator[Batch]":
    """Endless batches of a new permutation of the split each epoch, epochs laid end to end.

    Args:
        split: what to train on.
        make_batch: from the indices of a global batch, int ``[batch_size]``, and randomness that
            follows from the seed and the step alone.
        batch_size: over all hosts.
        seed: of the order, and of the randomness given to ``make_batch``.
        start_step: number of the first batch.
        num_threads: threads that call ``make_batch`` ahead; 0 for the one that asks for a batch.

    Raises:
        ValueError: if the batch exceeds the split, or another number is negative.
    """
    import grain

    if batch_size > len(split):
        raise ValueError(
            f"batch_size must be at most the {len(split)} images of {split.name}, or a batch would "
            f"hold an image twice; got {batch_size}"
        )
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must be >= 0, got {seed} and {start_step}")
    batches = (
        grain.MapDataset.range(len(split))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size, batch_fn=np.asarray)
        .random_map(make_batch)
    )
    iterator = iter(batches.to_iter_dataset(_read_options(num_threads)))
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


def evaluation_stream(
    split: ImageSplit | EncodedSplit,
    make_batch: Callable[[slice], Batch],
    *,
    batch_size: int,
    rows: slice,
    num_threads: int,
) -> "grain.DatasetIterator[Batch]":
    """The split once, in order; the last batch filled up with zeros that a mask marks.

    Args:
        split: what to evaluate on.
        make_batch: from a slice of the split, perhaps empty, ``{"image": ..., "label": ...}``.
        batch_size: over all hosts.
        rows: this host's of every batch.
        num_threads: threads that call ``make_batch`` ahead; 0 for the one that asks for a batch.
    """
    import grain

    def make_masked_batch(step: int) -> Batch:
        start = step * batch_size
        here = slice(*(min(start + row, len(split)) for row in (rows.start, rows.stop)))
        batch = make_batch(here)
        batch["mask"] = np.ones_like(batch["label"], np.float32)
        return {key: _pad(value, rows.stop - rows.start) for key, value in batch.items()}

    steps = grain.MapDataset.range(math.ceil(len(split) / batch_size))
    return iter(steps.map(make_masked_batch).to_iter_dataset(_read_options(num_threads)))


def _pad(values: np.ndarray, size: int) -> np.ndarray:
    """Adds zeros at the end of the first axis up to ``size``."""
    missing = size - len(values)
    return np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)) if missing else values


def _read_options(num_threads: int) -> "grain.ReadOptions":
    import grain

    if num_threads < 0:
        raise ValueError(f"num_threads must be >= 0, got {num_threads}")
    # Two batches ahead for each thread: one in the making, one ready.
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
