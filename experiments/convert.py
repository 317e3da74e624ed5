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
from experiments._config import Recipe
from experiments._models import MODELS
from experiments._packaged import Packaged, from_run
from experiments._recipes import get_recipe
from wsbcn_flax import models
from wsbcn_flax.data import IMAGENET_STATISTICS
from wsbcn_flax.transforms import (
    checkpoint_names,
    checkpoint_spec,
    guess_checkpoint_name,
    import_checkpoint,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Output:
    """What to write.

    Attributes:
        source: what to convert.
        out: the file to write.
        fold: whether kernels are standardized once and for all, leaving a plain network.
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
        name: of the architecture, such as R-50-GN-WS; by default the file's name, or else what
            the keys tell.
        class_names: a file of one class a line; by default ImageNet's synsets.
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
    return run_command(lambda: _convert(tyro.cli(kinds, args=argv, prog="convert")))


def _convert(options: Authors | Run) -> None:
    if isinstance(options, Run):
        packaged = from_run(options.source)
    else:
        state_dict = read_state_dict(options.source)
        name = options.name or _name(options.source, state_dict)
        packaged = package_checkpoint(state_dict, name, class_names=_class_names(options))
    if options.fold:
        packaged = packaged.folded()
    if options.format == "jax":
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(serialize(packaged))
    else:
        packaged.save(options.out)
    size = options.out.stat().st_size / 2**20
    count = sum(x.size for x in jax.tree.leaves(packaged.variables["params"]))
    rich.print(f"{options.out}: {packaged.recipe.model.name}, {count:,} parameters, {size:.1f} MiB")


def package_checkpoint(
    state_dict: Mapping[str, np.ndarray], name: str, *, class_names: tuple[str, ...]
) -> Packaged:
    """A PyTorch checkpoint of a published architecture, as the recipe's model of this package."""
    variables = import_checkpoint(state_dict, name)
    return Packaged(
        recipe=_recipe(name),
        variables=variables,
        class_names=class_names,
        image_shape=(224, 224, 3),
        mean=tuple(IMAGENET_STATISTICS.mean.tolist()),
        std=tuple(IMAGENET_STATISTICS.std.tolist()),
    )


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a PyTorch checkpoint, which may hold them under ``state_dict``.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: without PyTorch.
        ValueError: if it is no checkpoint of tensors; nothing else in it is ever executed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "PyTorch's checkpoints are read with PyTorch: pip install 'wsbcn_flax[torch]'."
        ) from error
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


def serialize(packaged: Packaged) -> bytes:
    """The model as a program from uint8 images [b, H, W, C], b any size, to logits.

    ``jax.export.deserialize`` reads it back, without this package.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "jax.export serializes with flatbuffers: pip install 'wsbcn_flax[convert]'."
        ) from error
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *packaged.image_shape), np.uint8)
    program = jax.jit(packaged.logits_fn())
    exported = jax.export.export(program, platforms=("cpu", "cuda", "tpu"))(images)
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
