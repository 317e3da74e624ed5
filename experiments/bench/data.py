"""Measures images per second of the input pipelines alone."""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments._image_data import ImageData
from experiments.bench import _timing as timing
from experiments.bench._timing import Key, Times, figures
from experiments.recipes import get_recipe
from wsbcn_flax._extras import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(timing.Measurement):
    """Measures images per second of the input pipelines that recipes train on.

    Attributes:
        in_memory: Name of the dataset in memory; one thread makes its batches.
        jpegs: Number of JPEG files to make, of about 500x375 pixels; at most 16 if ``quick``.
        image_size: Side of the crops of the files, in pixels.
        batch: Number of images in a batch; at most the number of files.
        threads: Numbers of threads to decode files with; 0 decodes in the calling thread.
        repeats: Number of timed passes over each dataset; at most three if ``quick``.
    """

    in_memory: Literal["mnist5k", "digits", "fashion", "mnist", "cifar10", "cifar100"] = "mnist5k"
    jpegs: int = 512
    image_size: int = 224
    batch: int = 64
    threads: tuple[int, ...] = (0, 1, 2)
    repeats: int = 5

    def __post_init__(self):
        super().__post_init__()
        if min(self.jpegs, self.batch) < 1:
            raise ValueError(
                f"jpegs and batch must be at least 1, received {self.jpegs} and {self.batch}."
            )

    def measure(self) -> list[dict[str, Any]]:
        """Measures, prints a table, and returns a row for each pipeline and number of threads."""
        files = min(self.jpegs, 16) if self.quick else self.jpegs
        batch = min(self.batch, files)
        with tempfile.TemporaryDirectory() as folder:
            write_jpegs(Path(folder), files)
            small = ImageData(get_recipe(f"{self.in_memory}_resnet20_bn").data)
            passes = {(f"{self.in_memory}_train", 1): functools.partial(train_pass, small, batch)}
            of_files = dataclasses.replace(
                get_recipe("imagenet_resnet50_bn").data, image_size=self.image_size, data_dir=folder
            )
            for threads in self.threads:
                large = ImageData(dataclasses.replace(of_files, threads=threads))
                passes["jpeg_train", threads] = functools.partial(train_pass, large, batch)
                passes["jpeg_eval", threads] = functools.partial(eval_pass, large, batch)
            seconds = timing.interleaved_seconds(passes, rounds=self.rounds)
            rows = data_rows(seconds, {key: make() for key, make in passes.items()})
        timing.print_rows(f"Input pipelines, in batches of {batch}", rows)
        return rows


def train_pass(data: ImageData, batch_size: int) -> int:
    """Makes the training batches of one epoch; returns their number of images."""
    steps = len(data.train_split) // batch_size
    endless: Any = data.train_batches(batch_size=batch_size, seed=0, start_step=0)
    with contextlib.closing(endless) as batches:
        return sum(len(batch["image"]) for batch in itertools.islice(batches, steps))


def eval_pass(data: ImageData, batch_size: int) -> int:
    """Makes the evaluation batches; returns their number of images."""
    return sum(int(batch["mask"].sum()) for batch in data.eval_batches(batch_size=batch_size))


def data_rows(seconds: Times, images: Mapping[Key, int]) -> list[dict[str, Any]]:
    """Returns a row for each pipeline and number of threads; times are of one pass."""
    return [
        {
            "pipeline": pipeline,
            "threads": threads,
            "images": images[pipeline, threads],
            "images_per_second": float(images[pipeline, threads] / np.median(times)),
            **figures(times),
        }
        for (pipeline, threads), times in seconds.items()
    ]


def write_jpegs(root: Path, count: int) -> None:
    """Writes ``imagenet/{train,val}/CLASS/NAME.JPEG``, the same ``count`` images in both.

    The images are smooth noise, whose files are as large as ImageNet's (90 kB) and as slow to
    decode. Sides are 500 and 375 pixels, varied by up to a tenth.
    """
    pil = require("PIL.Image", extra="train")
    generator = np.random.default_rng(0)
    for index in range(count):
        width, height = (round(side * generator.uniform(0.9, 1.1)) for side in (500, 375))
        noise = generator.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        image = pil.fromarray(noise).resize((width, height), pil.Resampling.BICUBIC)
        for split in ("train", "val"):
            path = root / "imagenet" / split / f"n{index % 8:08}" / f"{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)
