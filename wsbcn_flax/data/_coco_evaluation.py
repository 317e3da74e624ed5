"""Average precision of boxes and masks, as COCO defines it."""

import contextlib
import copy
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wsbcn_flax._extras import require
from wsbcn_flax.data._coco_file import label_of_category, read_coco_file
from wsbcn_flax.data._object_masks import encode_rle

Backend = Literal["pycocotools", "faster_coco_eval"]
_OUTPUTS = ("id", "image_hw", "boxes", "scores", "labels", "valid", "masks")
# The first six numbers of COCO's summary, and the recall with 100 detections.
_METRICS = {0: "AP", 1: "AP50", 2: "AP75", 3: "AP_small", 4: "AP_medium", 5: "AP_large", 8: "AR"}


class CocoEvaluator:
    """An evaluator that computes the average precision of detections in the images it receives.

    Each batch of outputs is a dict of D detections for each of B images:

    - "boxes": corners ``x1, y1, x2, y2`` in pixels of the resized image, ``[B, D, 4]``;
    - "scores" ``[B, D]``, and "labels" ``[B, D]`` from 1 to K;
    - "valid" ``[B, D]``: whether the slot holds a detection;
    - "masks" ``[B, D, M, M]``, if there are any: probabilities in the frame of the box;
    - "image_hw" ``[B, 2]``: height and width of the resized image without its padding;
    - "id" ``[B]``: id of the image in the annotation file;
    - "mask" ``[B]``, if the batch has one: 0 for the padding of the last batch.

    Other entries, such as means of losses, are ignored. Boxes are scaled to the original image, and
    masks are pasted there at the centres of pixels. Metrics are fractions: ``box_AP`` over IoU 0.5
    to 0.95, ``box_AP50``, ``box_AP75``, ``box_AP_small``, ``box_AP_medium``, ``box_AP_large``, and
    ``box_AR`` with 100 detections. Masks have the same, as ``mask_AP`` and so on. A metric of a
    size that no object has is left out. Source: https://cocodataset.org/#detection-eval

    Args:
        annotations: Annotation file of the evaluation split.
        results: File for the detections, in COCO's format for results; None writes none. In a run
            of several processes, let only one write.
        pixel: Pixels added to x2 - x1 and y2 - y1 to obtain a width and a height: 1 where x2 and
            y2 are the last pixel of a box, as in the authors' detectors.
        backend: "pycocotools", or "faster_coco_eval", which gives the same numbers faster.

    Raises:
        ValueError: If the annotation file is not in COCO's format. While adding, for an image or
            label that the file lacks, or for masks if it has an annotation without one. In
            ``result``, if no image was added.
        ImportError: If the backend is not installed; names the extra.

    Example:
        A cat, detected exactly in an image that was enlarged to twice its size:

        >>> import json, pathlib, tempfile
        >>> import numpy as np
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "cats.json"
        >>> content = {
        ...     "images": [{"id": 7, "file_name": "cat.jpg", "height": 8, "width": 16}],
        ...     "categories": [{"id": 17, "name": "cat"}],
        ...     "annotations": [{"id": 1, "image_id": 7, "category_id": 17, "bbox": [2, 3, 5, 4]}],
        ... }
        >>> _ = file.write_text(json.dumps(content))
        >>> evaluator = CocoEvaluator(file)
        >>> evaluator.add({
        ...     "id": np.array([7]),
        ...     "image_hw": np.array([[16, 32]]),
        ...     "boxes": np.array([[[4, 6, 14, 14]]]),
        ...     "scores": np.array([[0.9]]),
        ...     "labels": np.array([[1]]),
        ...     "valid": np.array([[True]]),
        ... })
        >>> round(evaluator.result()["box_AP"], 6)
        1.0
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        *,
        results: str | os.PathLike[str] | None = None,
        pixel: int = 0,
        backend: Backend = "pycocotools",
    ):
        self._truth_class, self._evaluation_class = _import_backend(backend)
        self._path, self._pixel = Path(annotations), pixel
        self._results_path = None if results is None else Path(results)
        self._content = read_coco_file(annotations)
        self._images = {image["id"]: image for image in self._content["images"]}
        self._category = {v: k for k, v in label_of_category(self._content).items()}
        self._seen: set[int] = set()
        self._has_masks = False
        self._results: list[dict[str, Any]] = []

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Adds the detections of one batch."""
        if "masks" in outputs and not self._has_masks:
            self._check_masks()
            self._has_masks = True
        found = {key: np.asarray(outputs[key]) for key in _OUTPUTS if key in outputs}
        wanted = np.asarray(outputs.get("mask", np.ones(len(found["id"]))), bool)
        for row in np.flatnonzero(wanted):
            self._add_image({key: value[row] for key, value in found.items()})

    def result(self) -> dict[str, float]:
        """Returns the metrics, and writes the results if a file was given.

        If an image was added twice, only its first detections count.
        """
        if not self._seen:
            raise ValueError("Evaluation needs at least one image, received none")
        if self._results_path is not None:
            self._results_path.parent.mkdir(parents=True, exist_ok=True)
            self._results_path.write_text(json.dumps(self._results))
        with contextlib.redirect_stdout(io.StringIO()):  # Both backends print as they go.
            metrics = self._score("bbox", "box", without="segmentation")
            if self._has_masks:
                metrics |= self._score("segm", "mask", without="bbox")
        return metrics

    def _check_masks(self) -> None:
        bare = [each["id"] for each in self._content["annotations"] if not each["segmentation"]]
        if bare:
            raise ValueError(
                f"{self._path}: annotations must have a segmentation for masks to be scored, "
                f"received {len(bare)} without one, such as {bare[0]}; leave out the masks"
            )

    def _add_image(self, outputs: Mapping[str, np.ndarray]) -> None:
        image = self._images.get(int(outputs["id"]))
        if image is None:
            raise ValueError(
                f"images must be in {self._path}, received id {outputs['id']}; are the batches of "
                "another split?"
            )
        if image["id"] in self._seen:
            return
        self._seen.add(image["id"])
        height, width = image["height"], image["width"]
        ratios = np.array([width, height] * 2) / np.tile(outputs["image_hw"][::-1], 2)
        for slot in np.flatnonzero(outputs["valid"]):
            box = outputs["boxes"][slot].astype(np.float64) * ratios
            box[2:] += self._pixel
            label = int(outputs["labels"][slot])
            if label not in self._category:
                raise ValueError(
                    f"labels must be from 1 to the {len(self._category)} categories of "
                    f"{self._path}, received {label}"
                )
            found = {
                "image_id": image["id"],
                "category_id": self._category[label],
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                "score": float(outputs["scores"][slot]),
            }
            if "masks" in outputs:
                mask = outputs["masks"][slot]
                found["segmentation"] = encode_rle(_paste(mask, box, (height, width)))
            self._results.append(found)

    def _score(self, kind: str, name: str, *, without: str) -> dict[str, float]:
        """Returns the metrics of boxes or of masks."""
        truth = self._truth_class()
        truth.dataset = copy.deepcopy(self._content)
        truth.createIndex()
        # COCO measures a detection's size by its box or its mask, whichever the results hold.
        results = [{k: v for k, v in each.items() if k != without} for each in self._results]
        found = truth.loadRes(results) if results else _nothing_found(truth, self._truth_class())
        evaluation = self._evaluation_class(truth, found, kind)
        evaluation.params.imgIds = sorted(self._seen)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats = {f"{name}_{key}": float(evaluation.stats[i]) for i, key in _METRICS.items()}
        return {key: value for key, value in stats.items() if value >= 0}  # -1: no such object


def _paste(mask: np.ndarray, box: np.ndarray, image_hw: tuple[int, int]) -> np.ndarray:
    from wsbcn_flax.ops.detection import paste_mask  # Nothing else in `data` imports JAX.

    return paste_mask(mask, box, image_hw, rounded=False)


def _nothing_found(truth: Any, empty: Any) -> Any:
    """Returns empty results, which ``loadRes`` cannot make."""
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _import_backend(name: Backend) -> tuple[Any, Any]:
    """Returns the backend's classes for ground truth and for evaluation."""
    if name == "faster_coco_eval":
        package = require(name, extra="faster-coco")
        return package.COCO, package.COCOeval_faster
    coco, evaluation = (require(f"pycocotools.{m}", extra="coco") for m in ("coco", "cocoeval"))
    return coco.COCO, evaluation.COCOeval
