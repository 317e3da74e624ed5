"""Batches for training, endless and shuffled, and for evaluation, once through and in order."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from wsbcn_flax.data._augment import Augment
from wsbcn_flax.data._normalize import Normalizer
from wsbcn_flax.data._split import ImageSplit
from wsbcn_flax.data._streams import Batch, evaluation_stream, host_rows, training_stream

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
) -> "grain.DatasetIterator[Batch]":
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
    rows = host_rows(batch_size, host_index, host_count)
    normalize = Normalizer(mean, std, image_shape=split.image_shape)

    def make_batch(indices: np.ndarray, rng: np.random.Generator) -> Batch:
        images = split.images[indices[rows]]
        if augment is not None:
            images = augment.apply(images, augment.draw(rng, batch_size)[rows])
        return {"image": normalize(images), "label": split.labels[indices[rows]]}

    return training_stream(
        split,
        make_batch,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        num_threads=num_threads,
    )


def eval_batches(
    split: ImageSplit,
    *,
    batch_size: int,
    mean: ArrayLike,
    std: ArrayLike,
    host_index: int = 0,
    host_count: int = 1,
    num_threads: int = 1,
) -> "grain.DatasetIterator[Batch]":
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
    normalize = Normalizer(mean, std, image_shape=split.image_shape)

    def make_batch(here: slice) -> Batch:
        return {"image": normalize(split.images[here]), "label": split.labels[here]}

    return evaluation_stream(
        split,
        make_batch,
        batch_size=batch_size,
        rows=host_rows(batch_size, host_index, host_count),
        num_threads=num_threads,
    )
