"""Boxes, masks and labels in images: `python -m experiments.detect MODEL IMAGE [IMAGE ...]`."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
import tyro

from experiments._command import run_command
from experiments._detection import DetectionRecipe
from experiments._model_file import TrainedModel, load_model
from experiments._object_figures import AnnotatedImage, draw_annotated_images
from experiments._tables import check_writable, table
from wsbcn_flax.data import DecodeImage, decode_rle, encode_rle, paste_mask
from wsbcn_flax.training.progress import Progress
from wsbcn_flax.training.writers import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectOptions:
    """Detects objects in image files.

    Attributes:
        model: Folder of a run, or a file that `experiments.convert` wrote.
        files: Image files.
        threshold: Smallest score of a detection that is kept.
        figure: File for a figure of the images with their detections.
        json: File for the detections in COCO's format for results, with names of files and classes.
    """

    model: tyro.conf.Positional[Path]
    files: tyro.conf.Positional[tuple[Path, ...]]
    threshold: float = 0.5
    figure: Path | None = Path("detections.png")
    json: Path | None = None

    def __post_init__(self):
        if not self.files:
            raise ValueError("detect needs an image file, received none.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, received {self.threshold}.")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(_detect, argv)


def _detect(argv: list[str]) -> None:
    options = tyro.cli(DetectOptions, args=argv, prog="detect")
    check_writable(options.json)
    model = load_model(options.model)
    if not isinstance(model.recipe, DetectionRecipe):
        raise ValueError(
            f"{options.model} must be a detector, received a model of another task; for classes "
            "run python -m experiments.predict."
        )
    found = detect_files(model, options.files, threshold=options.threshold)
    rows = [
        {"file": Path(each["file_name"]).name, "class": each["category"]}
        | {"score": f"{each['score']:.3f}", "box": " ".join(f"{x:.1f}" for x in each["bbox"])}
        for each in found
    ]
    if rows:
        columns = {"file": "file", "class": "class", "score": "score", "box": "x y width height"}
        shown = {key: (heading, str) for key, heading in columns.items()}
        rich.print(table(f"{options.model}", rows, shown))
    else:
        print(f"No object has a score of {options.threshold} or more; lower --threshold.")
    if options.json is not None:
        write_json(options.json, found)
    if options.figure is not None:
        _draw(options.files, found, model.data.class_names, options.figure)
        print(f"Figure: {options.figure}")


def detect_files(
    model: TrainedModel, files: tuple[Path, ...], *, threshold: float
) -> list[dict[str, Any]]:
    """Returns the detections in all files, as JSON values in COCO's format for results.

    Each has the name of its file as ``file_name`` and of its class as ``category``. Boxes and masks
    are in pixels of the file's own image.
    """
    detect, data = jax.jit(model.predict_fn()), model.data
    found = []
    with Progress("detect", total=len(files)) as progress:
        for number, path in enumerate(files, start=1):
            raw = model.recipe.read_input(path, data)
            outputs = jax.device_get(detect(jax.tree.map(lambda x: x[None], raw)))
            size = _read(path).shape[:2]
            found += _of_one_file(
                {name: x[0] for name, x in outputs.items()},
                size,
                file_name=str(path),
                names=data.class_names,
                threshold=threshold,
            )
            progress.update(number)
    return found


def _of_one_file(
    outputs: Mapping[str, np.ndarray],
    size: tuple[int, int],
    *,
    file_name: str,
    names: list[str],
    threshold: float,
) -> list[dict[str, Any]]:
    height, width = size
    scale = np.tile(np.array([width, height]) / outputs["image_hw"][::-1], 2)
    found = []
    for slot in np.flatnonzero(outputs["valid"] & (outputs["scores"] >= threshold)):
        box, label = outputs["boxes"][slot] * scale, int(outputs["labels"][slot])
        each = {
            "file_name": file_name,
            "category_id": label,
            "category": names[label],
            "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            "score": float(outputs["scores"][slot]),
        }
        if "masks" in outputs:
            each["segmentation"] = encode_rle(paste_mask(outputs["masks"][slot], box, *size))
        found.append(each)
    return found


def _read(path: Path) -> np.ndarray:
    return DecodeImage().map({"image": path.read_bytes(), "file_name": str(path)})["image"]


def _draw(
    files: tuple[Path, ...], found: list[dict[str, Any]], names: list[str], path: Path
) -> None:
    annotated = []
    for file in files:
        own = [each for each in found if each["file_name"] == str(file)]
        boxes = np.array([each["bbox"] for each in own]).reshape(-1, 4)
        masks = [decode_rle(each["segmentation"]) for each in own if "segmentation" in each]
        annotated.append(
            AnnotatedImage(
                image=_read(file),
                boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=-1),
                masks=np.stack(masks) if masks else None,
                labels=np.array([each["category_id"] for each in own], int),
                texts=[f"{each['category']} {each['score']:.2f}" for each in own],
                title=file.name,
            )
        )
    draw_annotated_images(annotated, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
