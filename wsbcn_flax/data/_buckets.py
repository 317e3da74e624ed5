"""Batches of images of several shapes; all images of a batch have one shape, its bucket."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from wsbcn_flax.data._coco import CocoSource
from wsbcn_flax.data._objects import ResizeShorter
from wsbcn_flax.data._pipeline import Batch, Source, eval_batches, train_batches

COCO_BUCKETS = ((800, 1344), (1344, 800))
"""Bucket sizes (height, width) for images of shorter side 800 and longer side at most 1333."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PadImage:
    """A transform that zero-pads an image, bottom and right, to the first bucket that it fits.

    After `Normalize`, zero is the mean color.

    Attributes:
        buckets: Bucket sizes (height, width), in pixels.

    Raises:
        ValueError: While mapping, if the image fits no bucket.

    Example:
        >>> import numpy as np
        >>> padded = PadImage(buckets=((4, 6), (6, 4))).map({"image": np.ones((5, 3, 3))})
        >>> padded["image"].shape, padded["image_hw"].tolist()
        ((6, 4, 3), [5, 3])
    """

    buckets: Sequence[tuple[int, int]] = COCO_BUCKETS

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """Pads ``element["image"]``; adds its unpadded size as "image_hw", int32 ``[2]``."""
        image = element["image"]
        height, width, channels = image.shape
        bucket = self.buckets[find_bucket(height, width, self.buckets)]
        padded = np.zeros((*bucket, channels), image.dtype)
        padded[:height, :width] = image
        return {**element, "image": padded, "image_hw": np.array([height, width], np.int32)}


def find_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> int:
    """Returns the index of the first bucket that an image fits.

    Raises:
        ValueError: If it fits none.
    """
    for number, bucket in enumerate(buckets):
        if height <= bucket[0] and width <= bucket[1]:
            return number
    raise ValueError(
        f"an image of {height}x{width} (height x width) must fit one of the buckets "
        f"{', '.join(f'{h}x{w}' for h, w in buckets)}; add a larger one or resize the images"
    )


def split_by_bucket(
    source: CocoSource,
    buckets: Sequence[tuple[int, int]] = COCO_BUCKETS,
    *,
    resize: ResizeShorter | None = None,
) -> list[CocoSource]:
    """Splits a source into one source for each bucket, in the order of the buckets.

    Buckets without an image are left out.

    Args:
        source: Images of any sizes.
        buckets: Buckets of `PadImage`.
        resize: The transform that resizes the images, if any.

    Raises:
        ValueError: If an image fits no bucket.
    """
    size = resize.size if resize else lambda height, width: (height, width)
    numbers = np.array([find_bucket(*size(i.height, i.width), buckets) for i in source.images])
    return [
        source.select(np.flatnonzero(numbers == number), name=f"{source.name} in {h}x{w}")
        for number, (h, w) in enumerate(buckets)
        if number in numbers
    ]


def bucketed_train_batches(
    sources: Sequence[Source], *, batch_size: int, seed: int, start_step: int = 0, **options: Any
) -> Iterator[Batch]:
    """Makes endless batches with `train_batches`, each from one of several sources.

    A source that holds n of all N examples gives n of every N batches, in an order drawn from the
    seed. The source of a batch depends only on the seed and the step. Every host and a resumed run
    use the same one.

    Args:
        sources: Sources such as those of `split_by_bucket`; each holds at least a batch.
        batch_size: Global batch size.
        seed: Seed of the order and of the random transforms, ``>= 0``.
        start_step: Number of the first batch.
        **options: Other arguments of `train_batches`.

    Returns:
        Iterator of batches, with ``close()``.

    Raises:
        ValueError: As `train_batches`.

    Example:
        >>> import contextlib
        >>> sources = [[{"side": 4}, {"side": 4}], [{"side": 6}]]
        >>> batches = bucketed_train_batches(sources, batch_size=1, seed=0)
        >>> with contextlib.closing(batches):
        ...     sorted(int(next(batches)["side"][0]) for _ in range(3))
        [4, 4, 6]
    """
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must be >= 0, received {seed} and {start_step}")
    sizes = np.array([len(source) for source in sources])
    rounds, position = divmod(start_step, int(sizes.sum()))
    drawn = _draw_round(sizes, seed, rounds)[:position]
    done = rounds * sizes + np.bincount(drawn, minlength=len(sizes))
    seeds = np.random.SeedSequence(seed).generate_state(len(sizes))
    streams = [
        train_batches(source, batch_size=batch_size, seed=int(own), start_step=int(step), **options)
        for source, own, step in zip(sources, seeds, done, strict=True)
    ]

    def draw() -> Iterator[Batch]:
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.callback(stream.close)
            for number in itertools.count(rounds):
                first = position if number == rounds else 0
                for bucket in _draw_round(sizes, seed, number)[first:]:
                    yield next(streams[bucket])

    return draw()


def bucketed_eval_batches(sources: Sequence[Source], **options: Any) -> Iterator[Batch]:
    """Reads sources one after the other; takes the arguments of `eval_batches`.

    The last batch of each source is padded, as by `eval_batches`.
    """
    for source in sources:
        yield from eval_batches(source, **options)


def _draw_round(sizes: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Returns shuffled indices of sources, each as often as the source has examples."""
    # NumPy has frozen RandomState's stream for good; default_rng's may change with a release.
    rng = np.random.RandomState(np.random.SeedSequence((seed, number)).generate_state(4))
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
