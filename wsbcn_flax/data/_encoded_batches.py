"""Batches of encoded images, decoded and cropped on the way, for training and for evaluation."""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from wsbcn_flax.data._crops import CentralCrop, RandomResizedCrop
from wsbcn_flax.data._decode import decode_rgb
from wsbcn_flax.data._encoded_split import EncodedSplit
from wsbcn_flax.data._normalize import Normalizer
from wsbcn_flax.data._streams import Batch, evaluation_stream, host_rows, training_stream

if TYPE_CHECKING:
    import grain


def encoded_train_batches(
    split: EncodedSplit,
    *,
    batch_size: int,
    image_size: int = 224,
    seed: int,
    mean: ArrayLike,
    std: ArrayLike,
    start_step: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    num_threads: int = 8,
) -> "grain.DatasetIterator[Batch]":
    """Endless shuffled batches of random-resized crops, by the rules of `train_batches`.

    A crop covers 8 to 100 % of the image, its width 3/4 to 4/3 of its height, and half of the crops
    are mirrored. Batch k depends on the seed and k alone, for any number of threads and hosts; a
    host reads and decodes its own rows only.

    Args:
        split: what to train on.
        batch_size: B, over all hosts; at most the size of the split.
        image_size: S, side of the crops.
        seed: of the order and of the crops, ``>= 0``.
        mean: of red, green and blue, as in `IMAGENET_STATISTICS`.
        std: likewise.
        start_step: number of the first batch; to resume, the number of steps done.
        host_index: which host this is, as `jax.process_index` gives it.
        host_count: H, number of hosts, a divisor of ``batch_size``.
        num_threads: threads that read and decode the images of a batch, while earlier batches are
            used; 0 decodes in the thread that asks for a batch.

    Returns:
        Iterator of ``{"image": float32 [B / H, S, S, 3], "label": int32 [B / H]}``. Call its
        ``close()`` (or use `contextlib.closing`) to stop its threads early.

    Raises:
        ValueError: if an argument breaks a rule above; while iterating, if a record is no image or
            has no class, naming it.
        ImportError: while iterating, if OpenCV is not installed; names the extra.

    Example:
        >>> import contextlib, io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (500, 375), "red").save(file, "JPEG")
        >>> records = [{"image": file.getvalue(), "label": label} for label in range(4)]
        >>> split = EncodedSplit(source=records, num_classes=4, name="four")
        >>> batches = encoded_train_batches(
        ...     split, batch_size=2, image_size=32, seed=0, mean=[0.5] * 3, std=[0.5] * 3
        ... )
        >>> with contextlib.closing(batches):
        ...     next(batches)["image"].shape
        (2, 32, 32, 3)
    """
    rows = host_rows(batch_size, host_index, host_count)
    crop = RandomResizedCrop(image_size=image_size)
    decode = _Decoder.make(split, image_size, mean, std, num_threads)

    def make_batch(indices: np.ndarray, rng: np.random.Generator) -> Batch:
        draws = crop.draw(rng, batch_size)[rows]
        return decode(indices[rows], lambda pixels, row: crop.apply(pixels, draws[row]))

    return training_stream(
        split,
        make_batch,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        num_threads=min(num_threads, 1),
    )


def encoded_eval_batches(
    split: EncodedSplit,
    *,
    batch_size: int,
    image_size: int = 224,
    resize: int = 256,
    mean: ArrayLike,
    std: ArrayLike,
    host_index: int = 0,
    host_count: int = 1,
    num_threads: int = 8,
) -> "grain.DatasetIterator[Batch]":
    """The whole split once, in order, in batches of central crops, by the rules of `eval_batches`.

    The shorter side of an image is resized to ``resize`` before the central square is taken. The
    last batch is filled up with images of zeros, label 0 and mask 0.

    Args:
        split: what to evaluate on.
        batch_size: B, over all hosts; may exceed the size of the split.
        image_size: S, side of the crops.
        resize: shorter side of the resized images, at least ``image_size``.
        mean: of red, green and blue, as in training.
        std: likewise.
        host_index: which host this is.
        host_count: H, number of hosts, a divisor of ``batch_size``.
        num_threads: threads that read and decode the images of a batch, while earlier batches are
            used; 0 decodes in the thread that asks for a batch.

    Returns:
        Iterator of ``{"image": float32 [B / H, S, S, 3], "label": int32 [B / H], "mask": float32
        [B / H]}``, the mask 1 for an image of the split and 0 for filling.

    Raises:
        ValueError: if an argument breaks a rule above; while iterating, if a record is no image or
            has no class, naming it.
        ImportError: while iterating, if OpenCV is not installed; names the extra.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (500, 375), "red").save(file, "JPEG")
        >>> records = [{"image": file.getvalue(), "label": label} for label in range(3)]
        >>> split = EncodedSplit(source=records, num_classes=3, name="three")
        >>> for batch in encoded_eval_batches(split, batch_size=2, mean=[0.5] * 3, std=[0.5] * 3):
        ...     print(batch["image"].shape, batch["label"], batch["mask"])
        (2, 224, 224, 3) [0 1] [1. 1.]
        (2, 224, 224, 3) [2 0] [1. 0.]
    """
    crop = CentralCrop(image_size=image_size, resize=resize)
    decode = _Decoder.make(split, image_size, mean, std, num_threads)

    def make_batch(here: slice) -> Batch:
        indices = np.arange(here.start, here.stop)
        return decode(indices, lambda pixels, _: crop.apply(pixels))

    return evaluation_stream(
        split,
        make_batch,
        batch_size=batch_size,
        rows=host_rows(batch_size, host_index, host_count),
        num_threads=min(num_threads, 1),
    )


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """Reads, decodes, crops and normalizes the images of a batch, each in one of its threads."""

    split: EncodedSplit
    image_shape: tuple[int, int, int]
    normalize: Normalizer
    num_threads: int

    @classmethod
    def make(
        cls,
        split: EncodedSplit,
        image_size: int,
        mean: ArrayLike,
        std: ArrayLike,
        num_threads: int,
    ) -> "_Decoder":
        shape = (image_size, image_size, 3)
        return cls(split, shape, Normalizer(mean, std, image_shape=shape), num_threads)

    def __call__(self, indices: np.ndarray, crop: Callable[[np.ndarray, int], np.ndarray]) -> Batch:
        """The images and labels of the records at ``indices``, cropped by ``crop(pixels, row)``."""
        images = np.empty((len(indices), *self.image_shape), np.float32)
        labels = np.empty(len(indices), np.int32)

        def decode(row: int) -> None:
            record = self.split.source[int(indices[row])]
            name = f"record {indices[row]} of {self.split.name}{_file_name(record)}"
            labels[row] = self._check_label(record["label"], name)
            pixels = crop(decode_rgb(record["image"], name=name), row)
            images[row] = self.normalize(pixels[np.newaxis])[0]

        if self.num_threads:
            # Threads start in microseconds: a pool for each batch leaves none to be stopped.
            with ThreadPoolExecutor(self.num_threads) as pool:
                list(pool.map(decode, range(len(indices))))
        else:
            for row in range(len(indices)):
                decode(row)
        return {"image": images, "label": labels}

    def _check_label(self, label: int, name: str) -> int:
        if not 0 <= label < self.split.num_classes:
            raise ValueError(
                f"{name} must have a label in [0, {self.split.num_classes}), received {label}; "
                "is it of a test split whose labels are secret?"
            )
        return label


def _file_name(record: Mapping[str, Any]) -> str:
    """The name of the record's file in parentheses, if it has one; tfds gives text as bytes."""
    name = record.get("file_name")
    return f" ({name.decode() if isinstance(name, bytes) else name})" if name else ""
