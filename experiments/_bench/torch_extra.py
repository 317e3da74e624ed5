"""PyTorch beside JAX: whether it is here, its threads, and its two memory formats.

Importing this does not import PyTorch, which the extra ``torch`` installs.
"""

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

MEMORY_FORMATS = ("contiguous", "channels_last")

RestT = TypeVar("RestT")


def check_torch() -> None:
    """Gives PyTorch all cores, as XLA has.

    Raises:
        ImportError: if it is not installed; names the extra.
    """
    if importlib.util.find_spec("torch") is None:
        raise ImportError(
            "--against torch needs PyTorch, which is not installed; "
            "run: pip install 'wsbcn_flax[torch]'"
        )
    importlib.import_module("torch").set_num_threads(os.cpu_count() or 1)


def torch_facts() -> str:
    """What PyTorch's figures depend on, in one line."""
    torch = importlib.import_module("torch")
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def in_format(name: str, memory_format: str) -> str:
    """What a call of PyTorch is named until ``keep_faster_format``."""
    return f"{name}/{memory_format}"


def keep_faster_format(
    seconds: Mapping[tuple[str, RestT], np.ndarray],
) -> tuple[dict[tuple[str, RestT], np.ndarray], dict[tuple[str, RestT], str]]:
    """Of calls named by ``in_format``, keeps those of the format with the least median.

    Returns:
        The times, with the others' as they are, and the format of each call kept.
    """
    kept: dict[tuple[str, RestT], np.ndarray] = {}
    formats: dict[tuple[str, RestT], str] = {}
    for (name, rest), times in seconds.items():
        name, _, memory_format = name.partition("/")
        key = (name, rest)
        if key not in kept or np.median(times) < np.median(kept[key]):
            kept[key] = times
            if memory_format:
                formats[key] = memory_format
    return kept, formats
