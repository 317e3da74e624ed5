"""Images with boxes and masks as the data of an experiment."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wsbcn_flax.data import (
    CAFFE_BGR_STATISTICS,
    COCO_BUCKETS,
    IMAGENET_STATISTICS,
    ChannelStatistics,
    CocoEvaluator,
    CocoSource,
    DecodeAnnotatedImage,
    Normalize,
    PadBoxes,
    PadImage,
    RandomFlipObjects,
    RasterizeMasks,
    ResizeShorter,
    ToBGR,
    bucketed_eval_batches,
    bucketed_train_batches,
    default_data_dir,
    load_coco,
    split_by_bucket,
)
from wsbcn_flax.training.processes import is_first_process

MASK_SIZE = 112  # Side of the masks in a batch, each over its object's box.
# Folder of a split's images and its annotation file, in the folder of the dataset.
_LAYOUTS = {
    "coco": ("{split}", "annotations/instances_{split}.json"),
    "scenes": ("{split}", "instances_{split}.json"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoConfig:
    """A dataset in COCO's format, and how its images are prepared.

    Attributes:
        name: Name of the layout of files, "coco" or "scenes", and of the folder in ``data_dir``.
        train_split: Training split.
        eval_split: Evaluation split.
        annotations: Annotation file of your own training data; the dataset's if None.
        images: Folder of your own training images; the dataset's if None.
        eval_annotations: Annotation file of your own evaluation data; the dataset's if None.
        eval_images: Folder of your own evaluation images; the dataset's if None.
        shorter: Shorter side that images are resized to, in pixels.
        longer: Upper limit of the longer side, in pixels.
        buckets: Heights and widths that images are padded to, in pixels.
        slots: Maximum number of objects in an image.
        caffe: Whether images are blue, green and red from 0 to 255 less their means, as in the
            authors' detectors. Otherwise they are red, green and blue, normalized as ImageNet's.
        threads: Number of threads that decode images.
        data_dir: Folder of datasets; a folder in the user's cache if None.
        results: File that each evaluation writes its detections to, in COCO's format for results.
    """

    name: str
    train_split: str = "train"
    eval_split: str = "val"
    annotations: str | None = None
    images: str | None = None
    eval_annotations: str | None = None
    eval_images: str | None = None
    shorter: int = 800
    longer: int = 1333
    buckets: tuple[tuple[int, int], ...] = COCO_BUCKETS
    slots: int = 100
    caffe: bool = False
    threads: int = 16
    data_dir: str | None = None
    results: str | None = None

    def __post_init__(self):
        if not self.buckets or any(side % 32 for bucket in self.buckets for side in bucket):
            raise ValueError(
                "data.buckets must be heights and widths that are multiples of 32, received "
                f"{self.buckets}; use the next multiples."
            )

    def paths(self, split: str, annotations: str | None, images: str | None) -> tuple[Path, Path]:
        """Returns the annotation file and the folder of images of a split.

        Raises:
            FileNotFoundError: If the annotation file is missing; says how to get it.
        """
        root = Path(self.data_dir).expanduser() if self.data_dir else default_data_dir()
        folder, file = (pattern.format(split=split) for pattern in _LAYOUTS[self.name])
        chosen = Path(annotations) if annotations else root / self.name / file
        if not chosen.is_file():
            advice = {
                "scenes": "Run: python -m experiments.scenes.",
                "coco": "Unpack COCO 2017's images and annotations there, from cocodataset.org.",
            }[self.name]
            raise FileNotFoundError(
                f"The annotation file {chosen} is missing. {advice} For your own data, pass "
                "--data.annotations, --data.images, --data.eval-annotations and --data.eval-images."
            )
        return chosen, Path(images) if images else root / self.name / folder


@dataclasses.dataclass(frozen=True)
class DetectionData:
    """The data of a detector, as sources that are indexed when they are first used.

    Attributes:
        config: Files and preparation.
        with_mask: Whether masks are loaded.
        known: Facts of the training split, as `facts` returns them; None indexes the split.
    """

    config: CocoConfig
    with_mask: bool
    known: Mapping[str, Any] | None = None

    @functools.cached_property
    def train_source(self) -> CocoSource:
        """The images to train on."""
        config = self.config
        files = config.paths(config.train_split, config.annotations, config.images)
        return load_coco(*files, masks=self.with_mask, max_boxes=config.slots)

    @functools.cached_property
    def eval_source(self) -> CocoSource:
        """The images to evaluate on, those without an object included."""
        config = self.config
        return load_coco(*self._eval_files, masks=False, keep_empty=True, max_boxes=config.slots)

    @property
    def _eval_files(self) -> tuple[Path, Path]:
        config = self.config
        return config.paths(config.eval_split, config.eval_annotations, config.eval_images)

    def facts(self) -> dict[str, Any]:
        """Returns the number of training images, the names of the classes and their ids."""
        if self.known is not None:
            return dict(self.known)
        source = self.train_source
        return {
            "train_size": len(source),
            "class_names": list(source.class_names),
            "category_ids": list(source.category_ids),
        }

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by label; the first is the background."""
        return self.facts()["class_names"]

    @property
    def category_ids(self) -> list[int]:
        """Ids of the classes in the annotation file, by label."""
        return self.facts()["category_ids"]

    @property
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of an image of the first bucket and of its objects."""
        slots = self.config.slots
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "image": ((*self.config.buckets[0], 3), np.float32),
            "image_hw": ((2,), np.int32),
            "id": ((), np.int32),
            "boxes": ((slots, 4), np.float32),
            "labels": ((slots,), np.int32),
            "valid": ((slots,), np.bool_),
        }
        if self.with_mask:
            shapes["masks"] = ((slots, MASK_SIZE, MASK_SIZE), np.uint8)
        return {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}

    def train_batches(
        self, *, batch_size: int, seed: int, start_step: int, **hosts: int
    ) -> Iterator[Mapping[str, Any]]:
        """Returns endless batches, each of images of one bucket, and mirrors half of the images."""
        masks = (RasterizeMasks(size=MASK_SIZE),) if self.with_mask else ()
        return bucketed_train_batches(
            split_by_bucket(self.train_source, self.config.buckets, resize=self.resize),
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            example=(
                DecodeAnnotatedImage(),
                *masks,
                self.resize,
                RandomFlipObjects(),
                *self._finish,
            ),
            num_threads=self.config.threads,
            **hosts,
        )

    @property
    def eval_size(self) -> int:
        """Number of images to evaluate on."""
        return len(self.eval_source)

    def eval_batches(self, *, batch_size: int, **hosts: int) -> Iterable[Mapping[str, Any]]:
        """Returns one pass over the evaluation images, in batches with a mask.

        Raises:
            ValueError: If the classes are not those of the training split.
        """
        names = list(self.eval_source.class_names)
        if names != self.class_names:
            raise ValueError(
                "The evaluation data must have the model's classes, received "
                f"{len(self.class_names)} names in the model and {len(names)} in the data; do both "
                "annotation files list the same categories?"
            )
        return bucketed_eval_batches(
            split_by_bucket(self.eval_source, self.config.buckets, resize=self.resize),
            batch_size=batch_size,
            example=(DecodeAnnotatedImage(), self.resize, *self._finish),
            num_threads=self.config.threads,
            **hosts,
        )

    def evaluator(self, *, pixel: int) -> CocoEvaluator:
        """Returns an evaluator of detections; ``pixel`` as in the detector's convention."""
        results = self.config.results if is_first_process() else None
        return CocoEvaluator(self._eval_files[0], pixel=pixel, results=results)

    @property
    def resize(self) -> ResizeShorter:
        """The transform that resizes images."""
        return ResizeShorter(shorter=self.config.shorter, longer=self.config.longer)

    @property
    def statistics(self) -> ChannelStatistics:
        """The mean and standard deviation that images are normalized by."""
        return CAFFE_BGR_STATISTICS if self.config.caffe else IMAGENET_STATISTICS

    @property
    def _finish(self) -> tuple[Any, ...]:
        return (
            *((ToBGR(),) if self.config.caffe else ()),
            Normalize(**self.statistics._asdict()),
            PadBoxes(slots=self.config.slots),
            PadImage(buckets=self.config.buckets),
        )
