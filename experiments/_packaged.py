"""A trained model with all that using it takes, in one safetensors file or from a run's folder."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments._config import Recipe, WeightConfig, recipe_from_dict
from experiments._data import load_dataset
from experiments._models import make_model, make_transform
from experiments._run import make_state, make_steps
from wsbcn_flax import WeightStandardization
from wsbcn_flax.training import Checkpointer, Classification, Partition, TrainState

_KEY = "wsbcn_flax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packaged:
    """A trained model.

    Attributes:
        recipe: what it was trained with.
        variables: ``params`` and ``batch_stats``, as arrays.
        class_names: in the order of the logits.
        image_shape: [H, W, C] of what it was trained on.
        mean: of each channel, in units of the full scale.
        std: likewise.
    """

    recipe: Recipe
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def task(self) -> Classification:
        """The model as a task; its parameters are raw where the recipe standardizes them."""
        return Classification(model=make_model(self.recipe, num_classes=len(self.class_names)))

    @property
    def state(self) -> TrainState:
        """The variables as a state to evaluate, without an optimizer's."""
        params, batch_stats = self.variables["params"], self.variables["batch_stats"]
        return TrainState(jnp.int32(0), params, batch_stats, ())

    @property
    def transform(self) -> WeightStandardization | None:
        """The transform of the raw parameters that the recipe trains with, if any."""
        model = make_model(self.recipe, num_classes=len(self.class_names))
        return make_transform(self.recipe.weight, model=model, image_shape=self.image_shape)

    def folded(self) -> "Packaged":
        """The same function with plain kernels: nothing is standardized any more."""
        transform = self.transform
        if transform is None:
            return self
        params = jax.device_get(transform(self.variables["params"]))
        return dataclasses.replace(
            self,
            recipe=dataclasses.replace(self.recipe, weight=WeightConfig(kind="none")),
            variables={**self.variables, "params": params},
        )

    def logits_fn(self) -> Callable[[jax.Array], jax.Array]:
        """Logits [B, classes] of uint8 images [B, H, W, C]; normalization is part of it."""
        plain = self.folded()
        model, variables = plain.task.model, jax.tree.map(jnp.asarray, plain.variables)
        mean, std = (jnp.asarray(value, jnp.float32) for value in (self.mean, self.std))

        def logits(images: jax.Array) -> jax.Array:
            scaled = images.astype(jnp.float32) / 255
            normalized = (scaled - mean[None, None, None]) / std[None, None, None]
            return cast(jax.Array, model.apply(variables, normalized, train=False))

        return logits

    def save(self, path: Path) -> None:
        """Writes one safetensors file; its metadata hold everything but the arrays."""
        fields = {
            "recipe": dataclasses.asdict(self.recipe),
            "class_names": self.class_names,
            "image_shape": self.image_shape,
            "mean": self.mean,
            "std": self.std,
        }
        arrays = traverse_util.flatten_dict(self.variables, sep="/")
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        _safetensors().numpy.save_file(arrays, path, metadata={_KEY: json.dumps(fields)})

    @classmethod
    def load(cls, path: Path) -> "Packaged":
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no safetensors file of ours, cut short for instance.
        """
        safetensors = _safetensors()
        if not path.is_file():
            raise FileNotFoundError(f"{path} is neither a converted file nor a run's folder.")
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            fields = json.loads(metadata[_KEY])
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} must be a safetensors file that `python -m experiments.convert` wrote; "
                f"this one is not, or is damaged ({error}). Convert it again."
            ) from error
        variables = traverse_util.unflatten_dict(arrays, sep="/")
        recipe = recipe_from_dict(fields.pop("recipe"))
        rest = {name: tuple(value) for name, value in fields.items()}
        return cls(recipe=recipe, variables={"batch_stats": {}, **variables}, **rest)


def load_model(path: Path) -> Packaged:
    """The model in a converted file or, at its newest sound checkpoint, in a run's folder."""
    return from_run(path) if path.is_dir() else Packaged.load(path)


def from_run(folder: Path) -> Packaged:
    """The newest sound checkpoint of a run.

    Raises:
        FileNotFoundError: if the folder holds no run, or a run without a checkpoint.
    """
    recipe_file = folder / "recipe.json"
    if not recipe_file.is_file():
        raise FileNotFoundError(
            f"{folder} must be a run's folder with a recipe.json, as `experiments.train` makes it."
        )
    recipe = recipe_from_dict(json.loads(recipe_file.read_text()))
    dataset = load_dataset(recipe.data)
    names = dataset.train_split.class_names
    # The schedule's length does not shape the optimizer's state.
    steps = make_steps(recipe, Partition(mode="jit"), num_classes=len(names), steps_per_epoch=1000)
    template = jax.eval_shape(
        lambda: make_state(
            steps.task,
            steps.optimizer,
            recipe.seed,
            transform=steps.transform,
            image_shape=dataset.image_shape,
        )
    )
    with Checkpointer(folder / "checkpoints") as checkpointer:
        restored = checkpointer.restore_latest(template)
    if restored is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint yet: train longer.")
    state = jax.device_get(restored.state)
    mean, std = dataset.statistics
    return Packaged(
        recipe=recipe,
        variables={"params": state.params, "batch_stats": state.batch_stats},
        class_names=names,
        image_shape=dataset.image_shape,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
    )


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Converted files need safetensors: pip install 'wsbcn_flax[convert]'."
        ) from error
    return safetensors
