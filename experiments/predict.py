"""Classes of image files: `python -m experiments.predict MODEL IMAGE [IMAGE ...]`."""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
import tyro
from rich.table import Table

from experiments._command import run_command
from experiments._packaged import Packaged, load_model
from wsbcn_flax.data import eval_crop


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What to classify, and with what.

    Attributes:
        model: a run's folder, or a file that `experiments.convert` wrote.
        images: image files, prepared as evaluation prepares them.
        top: how many classes to show for each image.
    """

    model: tyro.conf.Positional[Path]
    images: tyro.conf.Positional[tuple[Path, ...]]
    top: int = 5

    def __post_init__(self):
        if not self.images or self.top < 1:
            raise ValueError("predict needs an image file and at least one class to show.")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(lambda: _predict(tyro.cli(PredictOptions, args=argv, prog="predict")))


def _predict(options: PredictOptions) -> None:
    packaged = load_model(options.model)
    images = np.stack([read_image(path, packaged) for path in options.images])
    rich.print(_table(options, packaged.class_names, predict(packaged, images)))


def read_image(path: Path, packaged: Packaged) -> np.ndarray:
    """Uint8 [H, W, C] as the model takes it: cropped as in evaluation, or resized.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image.
    """
    content = path.read_bytes()
    data = packaged.recipe.data
    if data.name == "imagenet":
        return eval_crop(content, image_size=data.image_size, resize=data.resize, name=str(path))
    from PIL import Image, UnidentifiedImageError

    height, width, channels = packaged.image_shape
    try:
        with Image.open(io.BytesIO(content)) as image:
            resized = image.convert("L" if channels == 1 else "RGB").resize((width, height))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} must be an image file, PNG or JPEG, and is none.") from error
    return np.asarray(resized).reshape(packaged.image_shape)


def predict(packaged: Packaged, images: np.ndarray) -> np.ndarray:
    """Probabilities [B, classes] of uint8 images [B, H, W, C]."""
    logits = packaged.logits_fn()
    return np.asarray(jax.jit(lambda x: jax.nn.softmax(logits(x)))(images))


def _table(options: PredictOptions, names: tuple[str, ...], probabilities: Any) -> Table:
    table = Table(title=str(options.model))
    for column in ("image", "class"):
        table.add_column(column)
    table.add_column("probability", justify="right")
    for path, row in zip(options.images, probabilities, strict=True):
        for rank, index in enumerate(np.argsort(-row)[: options.top]):
            table.add_row("" if rank else path.name, names[index], f"{row[index]:.3f}")
        table.add_section()
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
