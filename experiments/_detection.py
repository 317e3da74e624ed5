"""The recipes of detection, and the experiments that they make."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments._detection_data import CocoConfig, DetectionData
from experiments._models import make_norm, make_transform, rematerialized
from experiments._recipe import Dtype, Recipe
from wsbcn_flax import models
from wsbcn_flax.data import DecodeImage, PadImage
from wsbcn_flax.data._decoding import resize
from wsbcn_flax.models.detection import MaskRCNN
from wsbcn_flax.ops.detection import AUTHORS, TORCHVISION, BoxConvention
from wsbcn_flax.tasks import Detection
from wsbcn_flax.training import Experiment, Partition

CONVENTIONS: dict[str, BoxConvention] = {
    "authors": AUTHORS,
    "authors_per_image": dataclasses.replace(AUTHORS, proposals_per="image"),
    "torchvision": TORCHVISION,
}
BACKBONES: dict[str, functools.partial] = {
    "r50": models.ResNet50,
    "r101": models.ResNet101,
    "x50": models.ResNeXt50_32x4d,
    "x101": models.ResNeXt101_32x4d,
    "tiny": functools.partial(
        models.ResNet,
        stage_sizes=(1, 1, 1, 1),
        features=64,
        stem_features=16,
        block=models.Bottleneck,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """A detector.

    Attributes:
        name: Name {mask,faster}_rcnn_{backbone}. Mask R-CNN finds boxes and masks, Faster R-CNN
            only boxes. Backbones are r50, r101, x50, x101 and tiny.
        features: Number of channels of the pyramid and of the heads.
        hidden: Number of channels of the box head's dense layer.
        frozen_stages: Number of parts of the backbone that are not trained; 2 freezes the stem and
            the first stage.
        convention: Convention of boxes, anchors and targets: "torchvision", "authors", or
            "authors_per_image", which selects proposals in each image. With "authors" the step
            depends on how the batch is split.
        leave_out_padding: Whether to exclude padding from the statistics of normalizations.
        anchor_sizes: Sides of the anchors of the five levels, in pixels.
        anchors: Number of anchors sampled in an image.
        regions: Number of regions sampled in an image.
        proposals: Numbers of proposals of an image, in training and in evaluation.
        weights: Classification network that the backbone's weights start from: a run's folder, a
            file that `experiments.convert` wrote, or a PyTorch checkpoint. None starts at random.
        dtype: Computation dtype; parameters, statistics, boxes and scores are float32.
        remat: Whether residual blocks are computed again in the backward pass.
    """

    name: str = "mask_rcnn_r50"
    features: int = 256
    hidden: int = 1024
    frozen_stages: int = 2
    convention: Literal["authors", "authors_per_image", "torchvision"] = "authors_per_image"
    leave_out_padding: bool = False
    anchor_sizes: tuple[float, float, float, float, float] = (32, 64, 128, 256, 512)
    anchors: int = 256
    regions: int = 512
    proposals: tuple[int, int] = (2000, 1000)
    weights: str | None = None
    dtype: Dtype = "float32"
    remat: bool = False

    def __post_init__(self):
        kind, _, backbone = self.name.rpartition("_")
        if kind not in ("mask_rcnn", "faster_rcnn") or backbone not in BACKBONES:
            raise ValueError(
                "model.name must be mask_rcnn or faster_rcnn followed by one of "
                f"_{', _'.join(BACKBONES)}, received {self.name!r}."
            )

    @property
    def with_mask(self) -> bool:
        """Whether there is a mask head."""
        return self.name.startswith("mask")

    @property
    def backbone(self) -> functools.partial:
        """The function that makes the backbone."""
        return BACKBONES[self.name.rpartition("_")[2]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionRecipe(Recipe):
    """A run of Faster R-CNN or Mask R-CNN.

    Attributes:
        data: Dataset.
        model: Detector.
    """

    any_batch = False

    data: CocoConfig
    model: DetectorConfig = DetectorConfig()

    def load_data(self) -> DetectionData:
        """Indexes the data.

        Raises:
            FileNotFoundError: If files are missing; says how to get them.
            ValueError: For an annotation file that is not in COCO's format; names the file.
        """
        data = DetectionData(self.data, self.model.with_mask)
        _ = data.train_source, data.eval_source  # Errors appear before the first step.
        return data

    def trained_variables(self) -> Mapping[str, Any]:
        """Returns the variables of the backbone's trained network, without its classifier.

        Raises:
            FileNotFoundError: If ``model.weights`` is neither a file nor a run.
            ValueError: For a file without a network's weights, or if ``data.caffe`` is set.
        """
        if self.model.weights is None:
            return {}
        if self.data.caffe:
            raise ValueError(
                "Classification networks take red, green and blue, normalized as ImageNet's, and "
                "data.caffe gives the detector blue, green and red from 0 to 255; with "
                "--model.weights use --data.no-caffe."
            )
        from experiments.convert import load_weights  # That imports the recipes.

        trained = load_weights(Path(self.model.weights).expanduser(), weight=self.weight)
        return {
            kind: {"backbone": {name: leaf for name, leaf in leaves.items() if name != "head"}}
            for kind, leaves in trained.items()
        }

    def data_of_run(self, facts: Mapping[str, Any]) -> DetectionData:
        """Returns the data of a run that recorded these facts; indexes only what is used."""
        if missing := set(COCO_FACTS["coco"]) - set(facts):
            raise KeyError(f"no {', '.join(sorted(missing))}")
        return DetectionData(self.data, self.model.with_mask, facts)

    def experiment(self, data: DetectionData | None = None) -> Experiment:
        """Returns the experiment on ``data``.

        Without data, it has the dataset's published sizes, which suffice to compile it.
        """
        data = data or self.data_of_run(COCO_FACTS[self.data.name])
        task = self.task(data, axis_name=Partition(mode=self.batch.mode).axis_name)
        # `stop_gradient` hides the convolutions before it.
        whole = task.model.clone(backbone=task.model.backbone.clone(frozen_stages=0))
        return self.assemble(
            task,
            data,
            train_size=data.facts()["train_size"],
            transform=make_transform(self.weight, model=whole, image_shape=(64, 64, 3)),
            evaluators=(functools.partial(data.evaluator, pixel=task.convention.pixel),),
        )

    def task(self, data: DetectionData, *, axis_name: str | None = None) -> Detection:
        """Returns the task of detecting the classes in ``data``.

        Args:
            data: Dataset.
            axis_name: Device axis that synced statistics are averaged over.
        """
        config = self.model
        norm, dtype = make_norm(self.norm, axis_name=axis_name), jnp.dtype(config.dtype)
        block = config.backbone.keywords["block"]
        backbone = config.backbone(
            num_classes=None,
            frozen_stages=config.frozen_stages,
            norm=norm,
            dtype=dtype,
            block=rematerialized(block) if config.remat else block,
        )
        return Detection(
            model=MaskRCNN(
                backbone=backbone,
                num_classes=len(data.class_names) - 1,
                with_mask=config.with_mask,
                features=config.features,
                hidden=config.hidden,
                norm=norm,
                dtype=dtype,
            ),
            convention=CONVENTIONS[config.convention],
            leave_out_padding=config.leave_out_padding,
            anchor_sizes=config.anchor_sizes,
            anchors=config.anchors,
            regions=config.regions,
            proposals=config.proposals,
            seed=self.seed,
        )

    def predict_fn(
        self, data: DetectionData, variables: Mapping[str, Any]
    ) -> Callable[[Any], dict[str, jax.Array]]:
        """Returns the function from padded images, as `read_input` makes them, to detections."""
        task = self.task(data)
        mean, std = (jnp.asarray(value, jnp.float32) for value in data.statistics)

        def detect(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            images, image_hw = inputs["image"], inputs["image_hw"]
            images = images[..., ::-1] if self.data.caffe else images
            normalized = images.astype(jnp.float32) / 255 - mean[None, None, None]
            normalized = normalized / std[None, None, None]
            # Padding is zero after the normalization, as in training.
            inside = [
                jnp.arange(images.shape[axis])[None] < image_hw[:, axis - 1, None]
                for axis in (1, 2)
            ]
            valid = inside[0][:, :, None, None] & inside[1][:, None, :, None]
            batch = {"image": jnp.where(valid, normalized, 0), "image_hw": image_hw}
            return task.evaluate(variables["params"], variables.get("batch_stats", {}), batch)

        return detect

    def raw_inputs(self, data: DetectionData, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of ``batch`` padded images and of their sizes."""
        return {
            "image": jax.ShapeDtypeStruct((batch, *self.data.buckets[0], 3), jnp.uint8),
            "image_hw": jax.ShapeDtypeStruct((batch, 2), jnp.int32),
        }

    def read_input(self, path: Path, data: DetectionData) -> dict[str, np.ndarray]:
        """Reads an image file, resizes it to fit the first bucket, and pads it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not an image.
        """
        return self.prepare(read_image(path), data)

    def prepare(self, image: np.ndarray, data: DetectionData) -> dict[str, np.ndarray]:
        """Resizes an image to fit the first bucket and pads it; adds its unpadded size."""
        h, w = data.resize.size(*image.shape[:2])
        ratio = min(1, self.data.buckets[0][0] / h, self.data.buckets[0][1] / w)
        image = resize(image, max(1, int(h * ratio)), max(1, int(w * ratio)))
        padded = PadImage(buckets=self.data.buckets[:1]).map({"image": image})
        return {"image": padded["image"], "image_hw": padded["image_hw"]}

    def describe_output(
        self, output: Mapping[str, np.ndarray], data: DetectionData, *, top: int
    ) -> list[dict[str, str]]:
        """Returns the highest-scoring detections, with boxes as fractions of the image's sides."""
        height, width = output["image_hw"]
        boxes = output["boxes"] / np.array([width, height, width, height])
        return [
            {
                "class": data.class_names[output["labels"][slot]],
                "score": f"{output['scores'][slot]:.3f}",
                "box (x1 y1 x2 y2)": " ".join(f"{value:.3f}" for value in boxes[slot]),
            }
            for slot in np.flatnonzero(output["valid"])[:top]
        ]


def read_image(path: Path) -> np.ndarray:
    """Reads an image file, uint8 [H, W, 3]."""
    return DecodeImage().map({"image": path.read_bytes(), "file_name": str(path)})["image"]


def _published_facts(classes: int, train_size: int) -> dict[str, Any]:
    names = ["background", *map(str, range(1, classes + 1))]
    return {"train_size": train_size, "class_names": names, "category_ids": list(range(len(names)))}


# 117,266 training images of COCO 2017 have an object.
COCO_FACTS = {"coco": _published_facts(80, 117_266), "scenes": _published_facts(10, 9_000)}
