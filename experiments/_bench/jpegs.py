"""JPEG files in ImageNet's layout, about as large as ImageNet's (90 kB), of random content."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT = 500, 375
_CLASSES = 8
# Waves of all lengths, the shorter the fainter, as in photographs: width of each, and its part.
_OCTAVES = ((4, 0.4), (16, 0.25), (64, 0.2), (256, 0.15))


def random_jpeg(generator: np.random.Generator) -> bytes:
    """A colour JPEG file of about 500x375 pixels; sides differ by up to a tenth."""
    width, height = (round(side * generator.uniform(0.9, 1.1)) for side in (_WIDTH, _HEIGHT))
    pixels = np.zeros((height, width, 3), np.float32)
    for octave, part in _OCTAVES:
        small = generator.integers(0, 256, (octave * 3 // 4, octave, 3), np.uint8)
        large = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        pixels += part * np.asarray(large, np.float32)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_jpeg_folders(
    root: Path, count: int, *, on_file: Callable[[], object] = lambda: None
) -> float:
    """Writes ``imagenet/{train,val}/CLASS/NAME.JPEG``, the same images in both.

    Args:
        root: of data sets, what ``load_encoded_split`` takes as ``data_dir``.
        count: files in each split, at least as many as there are classes.
        on_file: is called after each.

    Returns:
        The mean size of a file, in bytes.
    """
    generator, total = np.random.default_rng(0), 0
    for index in range(count):
        content = random_jpeg(generator)
        total += len(content)
        for split in ("train", "val"):
            folder = root / "imagenet" / split / f"n{index % _CLASSES:08}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{folder.name}_{index}.JPEG").write_bytes(content)
        on_file()
    return total / count
