"""Writes a trained model as one file: `python -m experiments.convert {authors,run} SOURCE OUT`.

The file is in the safetensors format, for `experiments.evaluate` and `experiments.predict`. With
`--format jax` it is a program from uint8 images to logits, serialized by `jax.export` and gzipped,
which adds a checksum. Read it by `jax.export.deserialize(bytearray(gzip.decompress(content)))`.
"""

import abc
import dataclasses
import gzip
import importlib.resources
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import rich
import tyro

from experiments._command import make_main
from experiments._image_data import PUBLISHED_FACTS
from experiments._model_file import TrainedModel, load_model
from experiments._recipe import Recipe, WeightConfig
from experiments._tables import check_writable
from experiments.recipes import get_recipe
from wsbcn_flax._extras import require
from wsbcn_flax.transforms import (
    checkpoint_names,
    checkpoint_spec,
    guess_checkpoint_name,
    import_checkpoint,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Conversion(abc.ABC):
    """Writes a trained model as one file.

    Attributes:
        source: File or folder to convert.
        out: File to write.
        fold: Whether to standardize kernels once and for all, which leaves a plain network.
        format: "safetensors", or "jax" for a serialized program (always folded).
    """

    source: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    fold: bool = False
    format: Literal["safetensors", "jax"] = "safetensors"

    @abc.abstractmethod
    def load(self) -> TrainedModel:
        """Loads the model from ``source``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Authors(_Conversion):
    """Converts a PyTorch checkpoint of the authors or of a torchvision ResNet.

    Attributes:
        name: Name of the architecture, such as R-50-GN-WS. By default it is found from the file's
            name or the keys.
        class_names: File with one class name a line; ImageNet's synsets by default.
    """

    name: str | None = None
    class_names: Path | None = None

    def load(self) -> TrainedModel:
        """Loads the checkpoint with the recipe that trains its architecture."""
        state_dict = read_state_dict(self.source)
        name = self.name or _name_of(self.source, state_dict)
        file = self.class_names
        if file is None:
            package = require("tensorflow_datasets", extra="train")
            file = importlib.resources.files(package) / "datasets/imagenet2012/labels.txt"
        class_names = tuple(file.read_text().splitlines())
        return model_of_checkpoint(state_dict, name, class_names=class_names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(_Conversion):
    """Converts the newest checkpoint in a folder that `experiments.train` made."""

    def load(self) -> TrainedModel:
        """Loads the checkpoint."""
        if not self.source.is_dir():
            raise ValueError(f"run needs the folder of a run, received {self.source}.")
        return load_model(self.source)


def convert(conversion: Authors | Run) -> None:
    """Writes a trained model as one file.

    Raises:
        ValueError: For a file whose name belongs to the other format.
    """
    out, other = conversion.out, {"jax": ".safetensors", "safetensors": ".gz"}[conversion.format]
    if out.suffix == other:
        raise ValueError(
            f"A file in the format {conversion.format} must not end in {other}, received {out}. "
            "Choose another name or --format."
        )
    check_writable(out, option="OUT")
    model = conversion.load()
    if conversion.fold:
        model = model.folded()
    if conversion.format == "jax":
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(gzip.compress(serialize(model), compresslevel=1, mtime=0))
    else:
        model.save(out)
    size = out.stat().st_size / 2**20
    count = sum(x.size for x in jax.tree.leaves(model.variables["params"]))
    rich.print(f"{out}: {model.recipe.model.name}, {count:,} parameters, {size:.1f} MiB")


def model_of_checkpoint(
    state_dict: Mapping[str, np.ndarray], name: str, *, class_names: tuple[str, ...]
) -> TrainedModel:
    """Returns the trained model that a PyTorch checkpoint of a published architecture holds."""
    facts = dataclasses.replace(PUBLISHED_FACTS["imagenet"], class_names=class_names)
    return TrainedModel(
        recipe=_recipe(name),
        facts=dataclasses.asdict(facts),
        variables=import_checkpoint(state_dict, name),
    )


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a PyTorch checkpoint, which may hold them under ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If PyTorch is not installed; names the extra.
        ValueError: If the file is not a checkpoint of tensors; code in it is never executed.
    """
    torch = require("torch", extra="torch")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch may raise anything for damaged bytes.
        raise ValueError(
            f"{path} must be a PyTorch checkpoint of tensors; it is damaged or holds other objects "
            f"({error!r:.200})."
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    arrays = {key: value.numpy() for key, value in tensors.items() if torch.is_tensor(value)}
    if not arrays:
        raise ValueError(f"{path} must hold a state dict of tensors, received {type(content)}.")
    return arrays


def load_weights(path: Path, *, weight: WeightConfig) -> dict[str, Any]:
    """Returns the variables of a run, of a converted file or of a PyTorch checkpoint.

    Warns if ``weight``, the transform that they will be used with, is not the one of training.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        model = load_model(path)
        _warn_of_another_function(path, model.recipe.weight.convention, weight)
        return model.variables
    state_dict = read_state_dict(path)
    name = _name_of(path, state_dict)
    # Keys alone do not tell whether a network was trained with Weight Standardization.
    if path.name.startswith(f"{name}."):
        _warn_of_another_function(path, checkpoint_spec(name).preset or "none", weight)
    return import_checkpoint(state_dict, name)


def _warn_of_another_function(path: Path, trained: str, weight: WeightConfig) -> None:
    if trained != weight.convention:
        kind = "none" if trained == "none" else f"ws --weight.preset {trained}"
        warnings.warn(
            "Kernels compute the same function only with the transform they were trained with, "
            f"received weight.kind {weight.kind} ({weight.convention}) for {path.name}, which was "
            f"trained with {trained}. Use --weight.kind {kind}.",
            stacklevel=2,
        )


def _name_of(path: Path, state_dict: Mapping[str, np.ndarray]) -> str:
    """Returns the architecture that a file is named after, or else the one of its keys."""
    stem = path.name.split(".")[0]
    return stem if stem in checkpoint_names() else guess_checkpoint_name(state_dict)


def serialize(model: TrainedModel) -> bytes:
    """Returns the program from raw inputs [b, ...] to outputs; b is any size, or 1 for detectors.

    ``jax.export.deserialize`` reads it back with flatbuffers, and without this package.
    """
    require("flatbuffers", extra="convert")
    batch = jax.export.symbolic_shape("b")[0] if model.recipe.any_batch else 1
    inputs = model.recipe.raw_inputs(model.data, batch)
    program = jax.jit(model.predict_fn())
    exported = jax.export.export(program, platforms=("cpu", "cuda", "tpu"))(inputs)
    return bytes(exported.serialize())


def _recipe(name: str) -> Recipe:
    """Returns the recipe that trains the architecture of a checkpoint."""
    spec = checkpoint_spec(name)
    weight = "" if spec.preset is None else "_ws"
    recipe = get_recipe(f"imagenet_{spec.model.lower()}_{spec.norm}{weight}")
    statistics = "batch" if spec.norm == "bcn" else recipe.norm.statistics
    return dataclasses.replace(recipe, norm=dataclasses.replace(recipe.norm, statistics=statistics))


main = make_main(
    convert,
    options=Annotated[Authors, tyro.conf.subcommand("authors")]
    | Annotated[Run, tyro.conf.subcommand("run")],
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
