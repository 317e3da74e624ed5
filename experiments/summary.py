"""Parameters, operations and memory of the networks: `python -m experiments.summary`."""

import dataclasses
import functools
import sys
from pathlib import Path

import tyro

from experiments._command import run_command
from experiments._image_data import SIZES
from experiments._models import make_model
from experiments.recipes import MODELS, get_recipe
from wsbcn_flax import WSConv
from wsbcn_flax.models import ModelSummary, summarize
from wsbcn_flax.training.writers import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummaryOptions:
    """Prints what networks cost.

    Attributes:
        models: Networks, as in a recipe's name; all by default. ImageNet's take 224x224 images and
            have 1000 classes, CIFAR's take 32x32 images and have 10 classes.
        norm: Normalization and weights, {norm}[_{weight}] as in a recipe's name.
        json: File to write the numbers to.
    """

    models: tuple[str, ...] = (*MODELS["imagenet"], *MODELS["cifar10"])
    norm: str = "bcn_ws"
    json: Path | None = None


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(lambda argv: _print(tyro.cli(SummaryOptions, args=argv)), argv)


def _print(options: SummaryOptions) -> None:
    print(f"{options.norm}: one image in float32, 2 FLOPs a multiply-add")
    columns = {"network": 18, "parameters": 12, "GFLOPs": 8, "activations MB": 16}
    summaries = {}
    print("".join(f"{heading:>{width}}" for heading, width in columns.items()))
    for name in options.models:
        summary = summaries[name] = summarize_model(name, options.norm)
        cells = (
            name,
            f"{summary.parameters:,}",
            f"{summary.flops / 1e9:.2f}",
            f"{summary.activation_bytes / 1e6:.1f}",
        )
        # Row by row, since deep networks take seconds each.
        row = zip(cells, columns.values(), strict=True)
        print("".join(f"{cell:>{width}}" for cell, width in row), flush=True)
    if options.json is not None:
        rows = {name: summary._asdict() for name, summary in summaries.items()}
        write_json(options.json, {"norm": options.norm, "models": rows})


def summarize_model(name: str, norm: str) -> ModelSummary:
    """Returns the summary of a network as its recipe builds it.

    Raises:
        ValueError: For an unknown network or normalization.
    """
    data = "imagenet" if name in MODELS["imagenet"] else "cifar10"
    recipe, sizes = get_recipe(f"{data}_{name}_{norm}"), SIZES[data]
    model = make_model(recipe, num_classes=sizes.num_classes)
    weight = recipe.weight
    if weight.kind != "none":
        # In training a transform standardizes; in the model it is counted with the rest.
        preset = weight.preset if weight.kind == "ws" else weight.kind
        model = model.clone(conv=functools.partial(WSConv, preset=preset))
    return summarize(model, sizes.image_shape)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
