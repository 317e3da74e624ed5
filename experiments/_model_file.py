"""Trained models with all that is needed to use them: a safetensors file or a run's folder."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments._recipe import Recipe, WeightConfig
from experiments.recipes import recipe_from_dict, recipe_to_dict
from wsbcn_flax._extras import require
from wsbcn_flax.training import Checkpointer, Data, Experiment, TrainState
from wsbcn_flax.training.writers import read_json

_KEY = "wsbcn_flax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model.

    Attributes:
        recipe: Recipe that it was trained with.
        facts: Facts of the data that it was trained on, as JSON values.
        variables: Arrays of ``params`` and ``batch_stats``; kernels that the recipe standardizes
            are raw.
    """

    recipe: Recipe
    facts: dict[str, Any]
    variables: dict[str, Any]

    @property
    def data(self) -> Data:
        """The dataset that it was trained on; nothing of it is loaded yet."""
        return self.recipe.data_of_run(self.facts)

    @property
    def experiment(self) -> Experiment:
        """The experiment that trained it, without `Ema`: ``variables`` already hold the average."""
        return dataclasses.replace(self.recipe, ema=None).experiment(self.data)

    @property
    def state(self) -> TrainState:
        """The state to evaluate, without an optimizer's state."""
        return TrainState(
            jnp.int32(0), self.variables["params"], self.variables.get("batch_stats", {}), ()
        )

    def folded(self) -> "TrainedModel":
        """Returns an equivalent model that holds standardized kernels and needs no transform."""
        transform = self.experiment.transform
        if transform is None:
            return self
        params = jax.device_get(transform(self.variables["params"]))
        return dataclasses.replace(
            self,
            recipe=dataclasses.replace(self.recipe, weight=WeightConfig(kind="none")),
            variables={**self.variables, "params": params},
        )

    def predict_fn(self) -> Callable[[jax.Array], Any]:
        """Returns the function from raw inputs, such as uint8 images, to outputs."""
        plain = self.folded()
        variables = jax.tree.map(jnp.asarray, plain.variables)
        return plain.recipe.predict_fn(plain.data, variables)

    def save(self, path: Path) -> None:
        """Writes one safetensors file; its metadata hold everything but the arrays."""
        arrays = traverse_util.flatten_dict(self.variables, sep="/")
        arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        fields = {"recipe": recipe_to_dict(self.recipe), "facts": self.facts}
        fields |= {"crc32": _checksum(arrays, fields)}
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors = require("safetensors.numpy", extra="convert")
        content = safetensors.save(arrays, metadata={_KEY: json.dumps(fields)})
        # Unlike `save_file`, with the user's permissions, and whole or not at all.
        partial = path.with_name(f"{path.name}.tmp")
        partial.write_bytes(content)
        partial.replace(path)


def load_model(path: Path) -> TrainedModel:
    """Loads a converted file, or the newest intact checkpoint in a run's folder.

    Raises:
        FileNotFoundError: If there is neither, or no checkpoint yet.
        ValueError: If the file is no safetensors file of this project, or is damaged.
    """
    if path.is_dir():
        recipe, facts, experiment, state = restore_run(path)
        state = jax.device_get(experiment.for_evaluation(state))
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return TrainedModel(recipe=recipe, facts=facts, variables=variables)
    safetensors = require("safetensors", extra="convert")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a converted file nor a run's folder.")
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise ValueError(
                f"{path} must be a safetensors file, received a gzip file, which may be a program "
                "that `experiments.convert --format jax` wrote: see `jax.export.deserialize`."
            )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fields = json.loads(metadata[_KEY])
        if fields.pop("crc32") != _checksum(arrays, fields):
            raise ValueError("its checksum does not match its content")
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} must be a safetensors file that `python -m experiments.convert` wrote; "
            f"this one is not, or is damaged ({error}). Convert it again."
        ) from error
    variables = {"batch_stats": {}, **traverse_util.unflatten_dict(arrays, sep="/")}
    recipe = recipe_from_dict(fields["recipe"])
    return TrainedModel(recipe=recipe, facts=fields["facts"], variables=variables)


def _checksum(arrays: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of everything in a file."""
    value = zlib.crc32(json.dumps(fields).encode())
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name].tobytes(), zlib.crc32(name.encode(), value))
    return value


def restore_run(folder: Path) -> tuple[Recipe, dict[str, Any], Experiment, TrainState]:
    """Returns a run's recipe, facts and experiment, and its state at the newest intact checkpoint.

    Raises:
        FileNotFoundError: If the folder holds no run, or no checkpoint yet.
    """
    files = folder / "recipe.json", folder / "data.json"
    if not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f"{folder} must be a run's folder with recipe.json and data.json, as "
            "`experiments.train` makes it."
        )
    values, facts = map(read_json, files)
    recipe = recipe_from_dict(values)
    try:
        data = recipe.data_of_run(facts)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{files[1]} must hold the facts that `experiments.train` wrote, received others "
            f"({error}); is it damaged or of another version?"
        ) from error
    experiment = recipe.experiment(data)
    with Checkpointer(folder / "checkpoints") as checkpointer:
        restored = checkpointer.restore_latest(jax.eval_shape(lambda: experiment.init(0)))
    if restored is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint yet. Train longer.")
    return recipe, facts, experiment, restored.state
