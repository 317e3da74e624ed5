"""Images per second of the input pipelines, alone, for numbers of threads."""

import contextlib
import dataclasses
import functools
import io
import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import rich

from experiments._tables import Column, machine_facts, table
from experiments.bench import _timing as timing
from wsbcn_flax._extras import require
from wsbcn_flax.data import (
    IMAGENET_STATISTICS,
    CentralCrop,
    DecodeImage,
    Normalize,
    RandomCrop,
    RandomFlip,
    RandomResizedCrop,
    channel_statistics,
    eval_batches,
    load_split,
    train_batches,
)
from wsbcn_flax.training.progress import Progress

_QUICK_JPEGS = 16
_WIDTH, _HEIGHT, _CLASSES = 500, 375, 8
# Waves of all lengths, the shorter the fainter, as in photographs: width of each, and its part.
_OCTAVES = ((4, 0.4), (16, 0.25), (64, 0.2), (256, 0.15))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(timing.Measurement):
    """Measures images per second of the input pipelines: images in memory, and JPEG files.

    Attributes:
        in_memory: Name of the dataset in memory, of which all images are used.
        data_dir: Folder of prepared datasets; a folder in the user's cache if None.
        jpegs: Number of JPEG files to make, of about 500x375 pixels, in a temporary folder; at
            most 16 if ``quick``.
        image_size: Side of the crops of the files, in pixels.
        batch: Number of images in a batch; at most that of the files.
        threads: Numbers of threads to measure with; 0 works in the thread that asks for a batch.
        repeats: Number of passes over each set that are timed; at most three if ``quick``.
    """

    in_memory: Literal["mnist5k", "digits", "fashion", "mnist", "cifar10", "cifar100"] = "mnist5k"
    data_dir: str | None = None
    jpegs: int = 512
    image_size: int = 224
    batch: int = 64
    threads: tuple[int, ...] = (0, 1, 2)
    repeats: int = 5

    def measure(self) -> list[dict[str, Any]]:
        """Measures, prints a table, and returns a row for each pipeline and number of threads."""
        files = min(self.jpegs, _QUICK_JPEGS) if self.quick else self.jpegs
        batch_size = min(self.batch, files)
        with tempfile.TemporaryDirectory() as folder:
            bytes_each = write_jpeg_folders(Path(folder), files)
            pipelines = self._pipelines(batch_size, folder)
            calls = {
                (name, threads): functools.partial(pipeline.run, threads)
                for name, pipeline in pipelines.items()
                for threads in self.threads
            }
            rows = data_rows(pipelines, timing.interleaved_seconds(calls, rounds=self.rounds))
        print(f"{machine_facts()}\nJPEG files of {bytes_each / 1e3:.0f} kB on average.")
        columns: dict[str, Column] = {
            "pipeline": ("pipeline", str),
            "threads": ("threads", str),
            "images_per_second": ("images/s", "{:,.0f}".format),
            "spread": ("spread", "{:.2f}".format),
        }
        rich.print(table(f"Images per second, in batches of {batch_size}", rows, columns))
        return rows

    def _pipelines(self, batch_size: int, folder: str) -> "dict[str, Pipeline]":
        small: Any = load_split(self.in_memory, "train+test", data_dir=self.data_dir)
        train, validation = (
            load_split("imagenet", split, data_dir=folder) for split in ("train", "validation")
        )
        of_small = Normalize(**channel_statistics(small.images)._asdict())
        normalize = Normalize(**IMAGENET_STATISTICS._asdict())
        random = DecodeImage(), RandomResizedCrop(image_size=self.image_size), RandomFlip()
        central = DecodeImage(), CentralCrop(image_size=self.image_size, resize=256)

        def training(source: Any, **transforms: Any) -> Pipeline:
            batches = len(source) // batch_size
            make = functools.partial(
                train_batches, source, batch_size=batch_size, seed=0, **transforms
            )
            return Pipeline(make, batches, batches * batch_size)

        evaluation = functools.partial(
            eval_batches, validation, batch_size=batch_size, example=central, batch=(normalize,)
        )
        return {
            f"{self.in_memory}_train": training(small, batch=(RandomCrop(padding=1), of_small)),
            "jpeg_train": training(train, example=random, batch=(normalize,)),
            "jpeg_eval": Pipeline(evaluation, -(-len(validation) // batch_size), len(validation)),
        }


class Pipeline(NamedTuple):
    """A way to make batches, by ``num_threads``, and the batches and images of one pass."""

    make: Callable[..., Any]
    batches: int
    images: int

    def run(self, threads: int) -> int:
        """Makes one pass; returns the number of images, the filling of a last batch included."""
        with contextlib.closing(self.make(num_threads=threads)) as batches:
            return sum(len(batch["image"]) for batch in itertools.islice(batches, self.batches))


def data_rows(
    pipelines: Mapping[str, Pipeline], seconds: Mapping[tuple[str, int], np.ndarray]
) -> list[dict[str, Any]]:
    """Returns a row for each pipeline and number of threads; times are of one pass."""
    return [
        {
            "pipeline": name,
            "threads": threads,
            "images": pipelines[name].images,
            "images_per_second": float(pipelines[name].images / np.median(times)),
            **timing.median_and_spread(times),
        }
        for (name, threads), times in seconds.items()
    ]


def write_jpeg_folders(root: Path, count: int) -> float:
    """Writes ``imagenet/{train,val}/CLASS/NAME.JPEG``, the same ``count`` images in both.

    They are of random content, and about as large as ImageNet's (90 kB).

    Returns:
        The mean size of a file, in bytes.
    """
    generator, total = np.random.default_rng(0), 0
    with Progress("make JPEG files", total=count) as progress:
        for index in range(count):
            content = _random_jpeg(generator)
            total += len(content)
            for split in ("train", "val"):
                folder = root / "imagenet" / split / f"n{index % _CLASSES:08}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{folder.name}_{index}.JPEG").write_bytes(content)
            progress.update(index + 1)
    return total / count


def _random_jpeg(generator: np.random.Generator) -> bytes:
    """A colour JPEG file of about 500x375 pixels; sides differ by up to a tenth."""
    pil = require("PIL.Image", extra="train")
    width, height = (round(side * generator.uniform(0.9, 1.1)) for side in (_WIDTH, _HEIGHT))
    pixels = np.zeros((height, width, 3), np.float32)
    for octave, part in _OCTAVES:
        small = generator.integers(0, 256, (octave * 3 // 4, octave, 3), np.uint8)
        large = pil.fromarray(small).resize((width, height), pil.Resampling.BICUBIC)
        pixels += part * np.asarray(large, np.float32)
    file = io.BytesIO()
    pil.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()
