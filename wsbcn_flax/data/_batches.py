"""Batches for training, endless and shuffled, and for evaluation, once through and in order."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from wsbcn_flax.data._augment import Augment
from wsbcn_flax.data._normalize import Normalizer
from wsbcn_flax.data._split import ImageSplit

if TYPE_CHECKING:
    import grain


def train_batches(
    split: ImageSplit,
    *,
    batch_size: int,
    seed: int,
    mean: ArrayLike,
    std: ArrayLike,
    augment: Augment | None = None,
    start_step: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    num_threads: int = 1,
) -> "grain.DatasetIterator[dict[str, np.ndarray]]":
    """Endless shuffled batches that depend on the seed and the step alone.

    Batch k is the same for any number of threads, whether the iterator started at step 0 or at k,
    and, put together over the hosts, for any number of hosts: host h of H gets rows
    ``h * B / H`` to ``(h + 1) * B / H`` of it, having drawn the random numbers of the whole batch
    but touched the pixels of its own rows only.

    Every epoch is a new permutation of the split, and the epochs are laid end to end before they
    are cut into batches: no sample is dropped, and where ``batch_size`` does not divide the size of
    the split, a batch holds the end of one epoch and the beginning of the next.

    Args:
        split: what to train on.
        batch_size: B, over all hosts; at most the size of the split.
        seed: of the order and of the augmentation, ``>= 0``.
        mean: ``[channels]``, as `channel_statistics` gives it.
        std: likewise.
        augment: random crops and flips; None for none (the order stays the same).
        start_step: number of the first batch; to resume, the number of steps done.
        host_index: which host this is, as `jax.process_index` gives it.
        host_count: number of hosts, a divisor of ``batch_size``.
        num_threads: threads that make batches ahead, for small images best 1; 0 makes them in the
            thread that asks for them.

    Returns:
        Iterator of ``{"image": float32 [B / H, height, width, channels], "label": int32 [B / H]}``.
        Call its ``close()`` (or use `contextlib.closing`) to stop its threads early.

    Raises:
        ValueError: if an argument breaks a rule above.

    Example:
        >>> import contextlib
        >>> import numpy as np
        >>> split = ImageSplit(
        ...     images=np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1),
        ...     labels=np.arange(4, dtype=np.int32),
        ...     num_classes=4,
        ...     name="four",
        ... )
        >>> batches = train_batches(split, batch_size=2, seed=0, mean=[0.0], std=[1.0])
        >>> with contextlib.closing(batches):
        ...     epoch = [next(batches)["label"] for _ in range(2)]
        >>> sorted(np.concatenate(epoch).tolist())
        [0, 1, 2, 3]
    """
    import grain

    rows = _host_rows(batch_size, host_index, host_count)
    if batch_size > len(split):
        raise ValueError(
            f"batch_size must be at most the {len(split)} images of {split.name}, or a batch would "
            f"hold an image twice; got {batch_size}"
        )
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must be >= 0, got {seed} and {start_step}")
    normalize = Normalizer(mean, std, image_shape=split.image_shape)

    def make_batch(indices: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        images = split.images[indices[rows]]
        if augment is not None:
            images = augment.apply(images, augment.draw(rng, batch_size)[rows])
        return {"image": normalize(images), "label": split.labels[indices[rows]]}

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


def eval_batches(
    split: ImageSplit,
    *,
    batch_size: int,
    mean: ArrayLike,
    std: ArrayLike,
    host_index: int = 0,
    host_count: int = 1,
    num_threads: int = 1,
) -> "grain.DatasetIterator[dict[str, np.ndarray]]":
    """The whole split once, in order, in batches of one shape.

    The last batch is filled up with images of zeros, label 0 and mask 0, so that a jitted step
    compiles once; sums weighted by the mask are exact. Every host gets the same number of batches.

    Args:
        split: what to evaluate on.
        batch_size: B, over all hosts; may exceed the size of the split.
        mean: ``[channels]``, the training split's.
        std: likewise.
        host_index: which host this is.
        host_count: H, number of hosts, a divisor of ``batch_size``; host h gets rows
            ``h * B / H`` to ``(h + 1) * B / H`` of every batch.
        num_threads: threads that make batches ahead, for small images best 1; 0 makes them in the
            thread that asks for them.

    Returns:
        Iterator of ``{"image": float32 [B / H, height, width, channels], "label": int32 [B / H],
        "mask": float32 [B / H]}``, the mask 1 for an image of the split and 0 for filling.

    Raises:
        ValueError: if an argument breaks a rule above.

    Example:
        >>> import numpy as np
        >>> split = ImageSplit(
        ...     images=np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1),
        ...     labels=np.arange(3, dtype=np.int32),
        ...     num_classes=3,
        ...     name="three",
        ... )
        >>> for batch in eval_batches(split, batch_size=2, mean=[0.0], std=[1.0]):
        ...     print(batch["label"], batch["mask"])
        [0 1] [1. 1.]
        [2 0] [1. 0.]
    """
    import grain

    rows = _host_rows(batch_size, host_index, host_count)
    normalize = Normalizer(mean, std, image_shape=split.image_shape)

    def make_batch(step: int) -> dict[str, np.ndarray]:
        start = step * batch_size
        here = slice(start + rows.start, start + rows.stop)
        batch = {
            "image": normalize(split.images[here]),
            "label": split.labels[here],
            "mask": np.ones_like(split.labels[here], np.float32),
        }
        return {key: _pad(value, rows.stop - rows.start) for key, value in batch.items()}

    steps = grain.MapDataset.range(math.ceil(len(split) / batch_size))
    return iter(steps.map(make_batch).to_iter_dataset(_read_options(num_threads)))


def _host_rows(batch_size: int, host_index: int, host_count: int) -> slice:
    """The rows of a global batch that one host gets."""
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


def _pad(values: np.ndarray, size: int) -> np.ndarray:
    """Adds zeros at the end of the first axis up to ``size``."""
    return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1))


def _read_options(num_threads: int) -> "grain.ReadOptions":
    import grain

    if num_threads < 0:
        raise ValueError(f"num_threads must be >= 0, got {num_threads}")
    # Two batches ahead for each thread: one in the making, one ready.
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
