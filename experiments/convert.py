"""Makes one file of a trained model: `python -m experiments.convert {authors,run} SOURCE OUT`.

The file is safetensors, for `experiments.evaluate` and `experiments.predict`, or with
`--format jax` a program serialized by `jax.export`, from uint8 images to logits.
"""

import dataclasses
import importlib.resources
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import rich
import tyro

from experiments._command import run_command
from experiments._image_data import SIZES, Facts
from experiments._model_file import TrainedModel, load_model
from experiments._models import MODELS
from experiments._recipe import Recipe
from experiments.recipes import get_recipe
from wsbcn_flax import models
from wsbcn_flax._extras import require
from wsbcn_flax.data import IMAGENET_STATISTICS
from wsbcn_flax.transforms import (
    checkpoint_names,
    checkpoint_spec,
    guess_checkpoint_name,
    import_checkpoint,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Output:
    """Writes a trained model as one file.

    Attributes:
        source: File or folder to convert.
        out: File to write.
        fold: Whether kernels are standardized once and for all, leaving a plain network.
        format: "safetensors", or "jax" for a serialized program (always folded).
    """

    source: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    fold: bool = False
    format: Literal["safetensors", "jax"] = "safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Authors(_Output):
    """Converts a PyTorch checkpoint of the authors', or of torchvision's ResNets.

    Attributes:
        name: Name of the architecture, such as R-50-GN-WS. By default it is the file's name, or
            follows from the keys.
        class_names: File of one class a line; ImageNet's synsets by default.
    """

    name: str | None = None
    class_names: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(_Output):
    """Converts the newest checkpoint in a folder that `experiments.train` made."""


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    kinds = (
        Annotated[Authors, tyro.conf.subcommand("authors")]
        | Annotated[Run, tyro.conf.subcommand("run")]
    )
    return run_command(lambda argv: _convert(tyro.cli(kinds, args=argv)), argv)


def _convert(options: Authors | Run) -> None:
    if isinstance(options, Run):
        if not options.source.is_dir():
            raise ValueError(f"run needs the folder of a run, received {options.source}.")
        model = load_model(options.source)
    else:
        state_dict = read_state_dict(options.source)
        name = options.name or _name(options.source, state_dict)
        model = model_of_checkpoint(state_dict, name, class_names=_class_names(options))
    if options.fold:
        model = model.folded()
    if options.format == "jax":
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(serialize(model))
    else:
        model.save(options.out)
    size = options.out.stat().st_size / 2**20
    count = sum(x.size for x in jax.tree.leaves(model.variables["params"]))
    rich.print(f"{options.out}: {model.recipe.model.name}, {count:,} parameters, {size:.1f} MiB")


def model_of_checkpoint(
    state_dict: Mapping[str, np.ndarray], name: str, *, class_names: tuple[str, ...]
) -> TrainedModel:
    """Returns the trained model that a PyTorch checkpoint of a published architecture holds."""
    sizes, statistics = SIZES["imagenet"], IMAGENET_STATISTICS
    facts = Facts(
        train_size=sizes.train_size,
        class_names=class_names,
        image_shape=sizes.image_shape,
        mean=tuple(statistics.mean.tolist()),
        std=tuple(statistics.std.tolist()),
    )
    return TrainedModel(
        recipe=_recipe(name),
        facts=dataclasses.asdict(facts),
        variables=import_checkpoint(state_dict, name),
    )


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a PyTorch checkpoint, which may hold them under ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: Without PyTorch; names the extra.
        ValueError: If it is no checkpoint of tensors; nothing else in it is ever executed.
    """
    torch = require("torch", extra="torch")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever torch raises: for damaged bytes that may be anything.
        raise ValueError(
            f"{path} must be a PyTorch checkpoint of tensors; it is damaged or holds other objects "
            f"({error!r:.200})."
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    arrays = {key: value.numpy() for key, value in tensors.items() if torch.is_tensor(value)}
    if not arrays:
        raise ValueError(f"{path} must hold a state dict of tensors; it holds {type(content)}.")
    return arrays


def serialize(model: TrainedModel) -> bytes:
    """Returns the program from raw inputs [b, ...], b any size, to outputs.

    ``jax.export.deserialize`` reads it back, without this package.
    """
    require("flatbuffers", extra="convert")
    (batch,) = jax.export.symbolic_shape("b")
    inputs = model.recipe.raw_inputs(model.data, batch)
    program = jax.jit(model.predict_fn())
    exported = jax.export.export(program, platforms=("cpu", "cuda", "tpu"))(inputs)
    return bytes(exported.serialize())


def _recipe(name: str) -> Recipe:
    """The recipe that trains the architecture of a checkpoint."""
    spec = checkpoint_spec(name)
    (model,) = (key for key, model in MODELS.items() if model is getattr(models, spec.model))
    weight = "" if spec.preset is None else "_ws"
    recipe = get_recipe(f"imagenet_{model}_{spec.norm}{weight}")
    statistics = "batch" if spec.norm == "bcn" else recipe.norm.statistics
    return dataclasses.replace(recipe, norm=dataclasses.replace(recipe.norm, statistics=statistics))


def _name(path: Path, state_dict: Mapping[str, np.ndarray]) -> str:
    stem = path.name.split(".")[0]
    return stem if stem in checkpoint_names() else guess_checkpoint_name(state_dict)


def _class_names(options: Authors) -> tuple[str, ...]:
    if options.class_names is not None:
        return tuple(options.class_names.read_text().splitlines())
    labels = "datasets/imagenet2012/labels.txt"
    return tuple(
        importlib.resources.files("tensorflow_datasets").joinpath(labels).read_text().split()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
