"""The file ``recipe.json``, which ties a folder to the recipe of its run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsbcn_flax.training.writers import read_json, write_json


def claim_folder(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Writes ``recipe.json``, or checks that the run in the folder has the same recipe.

    If the folder has neither a checkpoint nor a record of metrics, its run ended before it kept
    anything, and its recipe is replaced.

    Raises:
        ValueError: If the folder holds a run of another recipe, or the file is damaged.
    """
    path = folder / "recipe.json"
    wanted = json.loads(json.dumps(recipe))  # As read from the file, with tuples as lists.
    if not path.exists() or not _holds_a_run(folder):
        write_json(path, wanted)
        return
    there, asked = _flat(read_json(path)), _flat(wanted)
    names = [name for name in asked | there if there.get(name) != asked.get(name)]
    if names:
        values = (f"{name} {there.get(name)!r} -> {asked.get(name)!r}" for name in names)
        raise ValueError(
            f"{folder} holds a run of another recipe, received (there -> asked for): "
            f"{', '.join(values)}. Resume it with its own options (recipe.json), or choose another "
            "folder (--out)."
        )


def _holds_a_run(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    has_records = metrics.exists() and metrics.stat().st_size > 0
    return has_records or any((folder / "checkpoints").glob("*"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested values under names such as ``optim.learning_rate``."""
    flat = {}
    for name, value in values.items():
        is_group = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{name}.") if is_group else {f"{prefix}{name}": value}
    return flat
