"""Detects objects in images: `python -m experiments.detect MODEL IMAGE [IMAGE ...]`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
import tyro

from experiments._command import make_main
from experiments._detection import DetectionRecipe, read_image
from experiments._detection_data import DetectionData
from experiments._model_file import TrainedModel, load_model
from experiments._object_figures import AnnotatedImage, draw_annotated_images
from experiments._tables import check_writable, table
from wsbcn_flax.data import decode_rle, encode_rle
from wsbcn_flax.ops.detection import paste_mask
from wsbcn_flax.training.progress import Progress
from wsbcn_flax.training.writers import write_json


def detect(
    model: tyro.conf.Positional[Path],
    files: tyro.conf.Positional[tuple[Path, ...]],
    *,
    threshold: float = 0.5,
    figure: Path | None = Path("detections.png"),
    json: Path | None = None,
) -> None:
    """Detects objects in image files.

    Args:
        model: Folder of a run, or a file that `experiments.convert` wrote.
        files: Image files.
        threshold: Minimum score of the detections to keep.
        figure: File for a figure of the images with their detections.
        json: File for the detections in COCO's format for results, with names of files and classes.
    """
    if not files or not 0 <= threshold <= 1:
        raise ValueError(
            f"detect needs an image file and a threshold from 0 to 1, received {len(files)} files "
            f"and --threshold {threshold}."
        )
    check_writable(json)
    check_writable(figure, option="--figure", figure=True)
    found = detect_files(load_model(model), files, threshold=threshold)
    rows = [
        {"file": Path(each["file_name"]).name, "class": each["category"]}
        | {"score": f"{each['score']:.3f}", "box": " ".join(f"{x:.1f}" for x in each["bbox"])}
        for each in found
    ]
    if rows:
        headings = {"file": "file", "class": "class", "score": "score", "box": "x y width height"}
        rich.print(table(f"{model}", rows, {key: (text, str) for key, text in headings.items()}))
    else:
        print(f"No object has a score of {threshold} or more; lower --threshold.")
    if json is not None:
        write_json(json, found)
    if figure is not None:
        _draw(files, found, figure)
        print(f"Figure: {figure}")


def detect_files(
    model: TrainedModel, files: tuple[Path, ...], *, threshold: float
) -> list[dict[str, Any]]:
    """Returns the detections in all files, as JSON values in COCO's format for results.

    Each has the name of its file as ``file_name`` and the name of its class as ``category``. Boxes
    and masks are in pixels of the original image.

    Raises:
        ValueError: For a model of another task.
    """
    recipe = model.recipe
    if not isinstance(recipe, DetectionRecipe):
        raise ValueError(
            "The model must be a detector, received one of another task; for classification "
            "run python -m experiments.predict."
        )
    predict, data = jax.jit(model.predict_fn()), recipe.data_of_run(model.facts)
    found = []
    with Progress("detect", total=len(files)) as progress:
        for number, path in enumerate(files, start=1):
            image = read_image(path)
            raw = jax.tree.map(lambda x: x[None], recipe.prepare(image, data))
            outputs = jax.device_get(predict(raw))
            found += _of_one_file(
                {name: x[0] for name, x in outputs.items()},
                image.shape[:2],
                file_name=str(path),
                data=data,
                threshold=threshold,
            )
            progress.update(number)
    return found


def _of_one_file(
    outputs: Mapping[str, np.ndarray],
    size: tuple[int, int],
    *,
    file_name: str,
    data: DetectionData,
    threshold: float,
) -> list[dict[str, Any]]:
    height, width = size
    scale = np.tile(np.array([width, height]) / outputs["image_hw"][::-1], 2)
    found = []
    for slot in np.flatnonzero(outputs["valid"] & (outputs["scores"] >= threshold)):
        box, label = outputs["boxes"][slot] * scale, int(outputs["labels"][slot])
        each = {
            "file_name": file_name,
            "category_id": data.category_ids[label],
            "category": data.class_names[label],
            "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            "score": float(outputs["scores"][slot]),
        }
        if "masks" in outputs:
            each["segmentation"] = encode_rle(
                paste_mask(outputs["masks"][slot], box, size, rounded=False)
            )
        found.append(each)
    return found


def _draw(files: tuple[Path, ...], found: list[dict[str, Any]], path: Path) -> None:
    annotated = []
    for file in files:
        own = [each for each in found if each["file_name"] == str(file)]
        boxes = np.array([each["bbox"] for each in own]).reshape(-1, 4)
        masks = [decode_rle(each["segmentation"]) for each in own if "segmentation" in each]
        annotated.append(
            AnnotatedImage(
                image=read_image(file),
                boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=-1),
                masks=np.stack(masks) if masks else None,
                labels=np.array([each["category_id"] for each in own], int),
                texts=[f"{each['category']} {each['score']:.2f}" for each in own],
                title=file.name,
            )
        )
    draw_annotated_images(annotated, path)


main = make_main(detect)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
