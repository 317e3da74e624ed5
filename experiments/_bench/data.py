"""Images per second of the input pipelines, alone, for numbers of threads."""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments._bench.jpegs import write_jpeg_folders
from experiments._bench.options import TimedOptions, check_writable, save
from experiments._bench.printing import (
    in_units_of,
    machine_facts,
    progress_bar,
    rows_table,
    two_decimals,
)
from experiments._bench.timing import Call, interleaved_seconds, median_and_spread
from wsbcn_flax.data import (
    IMAGENET_STATISTICS,
    Augment,
    channel_statistics,
    dataset_names,
    encoded_eval_batches,
    encoded_train_batches,
    load_encoded_split,
    load_split,
    train_batches,
)

_QUICK_JPEGS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(TimedOptions):
    """Images per second of the input pipelines: small images in memory, and JPEG files.

    Attributes:
        in_memory: name of the data set in memory, of which all images are used.
        data_dir: folder of prepared data sets; a folder in the user's cache if None.
        jpegs: files to make, of about 500x375 pixels, in a temporary folder; 16 if ``quick``.
        image_size: side of the crops of the files.
        batch: images in a batch.
        threads: numbers of threads to measure with; 0 works in the thread that asks for a batch.
        repeats: passes over each set that are timed; three at most if ``quick``.
    """

    in_memory: str = "mnist5k"
    data_dir: str | None = None
    jpegs: int = 512
    image_size: int = 224
    batch: int = 64
    threads: tuple[int, ...] = (0, 1, 2)
    repeats: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.in_memory not in dataset_names():
            raise ValueError(
                f"in_memory must be one of {', '.join(dataset_names())}, received "
                f"{self.in_memory!r}."
            )
        if not 1 <= self.image_size <= 256:
            raise ValueError(f"image_size must be from 1 to 256, received {self.image_size}.")
        if not 1 <= self.batch <= self.jpegs:
            raise ValueError(
                f"batch must be from 1 to the number of JPEG files, received {self.batch} and "
                f"jpegs={self.jpegs}."
            )
        if not self.threads or min(self.threads) < 0:
            raise ValueError(f"threads must be numbers of at least 0, received {self.threads}.")

    @property
    def files(self) -> int:
        """How many files are made."""
        return min(self.jpegs, _QUICK_JPEGS) if self.quick else self.jpegs

    @property
    def batch_size(self) -> int:
        """Images in a batch, of which there is at least one of files."""
        return min(self.batch, self.files)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A way to make batches, and how much of it is one pass.

    Attributes:
        make: the iterator over batches, by the number of threads.
        batches: in a pass.
        images: in a pass.
    """

    make: Callable[..., Any]
    batches: int
    images: int

    def run(self, threads: int) -> int:
        """One pass; how many images it gave, the filling of a last batch included."""
        batches = self.make(num_threads=threads)
        with contextlib.closing(batches):
            return sum(len(batch["image"]) for batch in itertools.islice(batches, self.batches))


def run_data(config: Data, console: Console) -> list[dict[str, Any]]:
    """Measures, prints and returns the rows of ``data``, writing them where asked to.

    Raises:
        ImportError: if a package that reads the data is not installed; names the extra.
        OSError: if the file cannot be written.
    """
    check_writable(config.json)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pipelines = in_memory_pipelines(config)
        with progress_bar(config.files, "making JPEG files") as advance:
            bytes_each = write_jpeg_folders(root, config.files, on_file=advance)
        pipelines |= jpeg_pipelines(config, root)
        calls: dict[tuple[str, int], Call] = {
            (name, threads): functools.partial(pipeline.run, threads)
            for name, pipeline in pipelines.items()
            for threads in config.threads
        }
        with progress_bar(len(calls) + config.rounds) as advance:
            seconds = interleaved_seconds(
                calls, rounds=config.rounds, on_warm=advance, on_round=advance
            )
    rows = data_rows(pipelines, seconds)
    console.print(machine_facts())
    console.print(f"JPEG files of {bytes_each / 1e3:.0f} kB on average.")
    console.print(
        rows_table(
            rows,
            title=f"Images per second, in batches of {config.batch_size}",
            labels={"pipeline": "pipeline", "threads": "threads"},
            figures={
                "images_per_second": ("images/s", in_units_of(1)),
                "spread": ("spread", two_decimals),
            },
        )
    )
    save(config.json, rows)
    return rows


def in_memory_pipelines(config: Data) -> dict[str, Pipeline]:
    """The pipeline of small images, with random crops."""
    split = load_split(config.in_memory, "train+test", data_dir=config.data_dir)
    mean, std = channel_statistics(split.images)
    make = functools.partial(
        train_batches,
        split,
        batch_size=config.batch_size,
        seed=0,
        mean=mean,
        std=std,
        augment=Augment(crop_padding=1),
    )
    batches = len(split) // config.batch_size
    return {f"{config.in_memory}_train": Pipeline(make, batches, batches * config.batch_size)}


def jpeg_pipelines(config: Data, root: Path) -> dict[str, Pipeline]:
    """The pipelines of JPEG files: random-resized crops, and central crops of resized images."""
    mean, std = IMAGENET_STATISTICS
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "mean": mean,
        "std": std,
    }
    train = load_encoded_split("imagenet", "train", data_dir=root)
    validation = load_encoded_split("imagenet", "validation", data_dir=root)
    batches = len(train) // config.batch_size
    make_train = functools.partial(encoded_train_batches, train, seed=0, **options)
    make_eval = functools.partial(encoded_eval_batches, validation, **options)
    return {
        "jpeg_train": Pipeline(make_train, batches, batches * config.batch_size),
        "jpeg_eval": Pipeline(make_eval, -(-len(validation) // config.batch_size), len(validation)),
    }


def data_rows(
    pipelines: Mapping[str, Pipeline], seconds: Mapping[tuple[str, int], np.ndarray]
) -> list[dict[str, Any]]:
    """One row for each pipeline and number of threads, ready for JSON; times are of one pass."""
    return [
        {
            "pipeline": name,
            "threads": threads,
            "images": pipelines[name].images,
            "images_per_second": float(pipelines[name].images / np.median(times)),
            **median_and_spread(times),
        }
        for (name, threads), times in seconds.items()
    ]
