"""Small image files, and folders of them as torchvision unpacks ImageNet."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n02099601")


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    """Encodes an image, or its pixels, uint8 ``[H, W]`` or ``[H, W, 3]``, as a file."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def smooth_image(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Makes an image, uint8 ``[H, W, 3]``, so smooth that all ways to resize it agree."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width, :1][:2] / max(height, width)
    fy, fx, phase = rng.uniform(3, 12, 3), rng.uniform(3, 12, 3), rng.uniform(0, 6, 3)
    return (127.5 + 120 * np.sin(fy * y + fx * x + phase)).astype(np.uint8)


def write_image_folder(root: Path, *, train: int = 24, val: int = 9) -> dict[str, int]:
    """Writes ``{train,val}/CLASS/*.JPEG``; returns the label of every file by its content."""
    labels = {}
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            label = index % len(CLASSES)
            file = root / split / CLASSES[label] / f"{CLASSES[label]}_{index}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            content = encode(smooth_image(30 + index, 40, seed=1000 * count + index), "JPEG")
            file.write_bytes(content)
            labels[content] = label
    return labels
