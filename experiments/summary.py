"""Parameters, operations and memory of the networks: `python -m experiments.summary`."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path

import rich
import tyro
from rich.table import Table

from experiments._command import run_command
from experiments._files import write_json
from experiments._models import make_model, make_transform
from experiments._recipes import get_recipe
from experiments._results import display_name
from experiments._training import CIFAR, IMAGENET
from wsbcn_flax import WSConv
from wsbcn_flax.models import ModelSummary, summarize
from wsbcn_flax.training import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummaryOptions:
    """What to summarize.

    Attributes:
        models: networks, as in a recipe's name: ImageNet's for 224x224 images and 1000 classes,
            CIFAR's for 32x32 images and 10 classes. All of them by default.
        norm: {norm}[_{weight}] as in a recipe's name.
        json: file to write the numbers to.
    """

    models: tuple[str, ...] = (*IMAGENET, *CIFAR)
    norm: str = "bcn_ws"
    json: Path | None = None


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return run_command(lambda: _print(tyro.cli(SummaryOptions, args=argv, prog="summary")))


def _print(options: SummaryOptions) -> None:
    summaries: dict[str, ModelSummary] = {}
    with Progress("summary", total=len(options.models)) as progress:
        for name in options.models:
            summaries[name] = summarize_model(name, options.norm)
            progress.update(len(summaries))
    rich.print(_table(summaries, title=display_name(options.norm)))
    if options.json is not None:
        rows = {name: summary._asdict() for name, summary in summaries.items()}
        write_json(options.json, {"norm": options.norm, "models": rows})


def summarize_model(name: str, norm: str) -> ModelSummary:
    """The summary of a network as its recipe builds it.

    Raises:
        ValueError: for an unknown network or normalization.
    """
    large = name in IMAGENET
    recipe = get_recipe(f"{'imagenet' if large else 'cifar10'}_{name}_{norm}")
    model = make_model(recipe, num_classes=1000 if large else 10)
    transform = make_transform(recipe.weight)
    if transform is not None:
        # In training a transform standardizes; in the model it is counted with the rest.
        model = model.clone(conv=functools.partial(WSConv, preset=transform.preset))
    size = recipe.data.image_size if large else 32
    return summarize(model, (size, size, 3))


def _table(summaries: Mapping[str, ModelSummary], *, title: str) -> Table:
    table = Table(title=f"{title}: for one image in float32, 2 FLOPs a multiply-add")
    table.add_column("network")
    for column in ("parameters", "GFLOPs", "activations MB"):
        table.add_column(column, justify="right")
    for name, summary in summaries.items():
        table.add_row(
            name,
            f"{summary.parameters:,}",
            f"{summary.flops / 1e9:.2f}",
            f"{summary.activation_bytes / 1e6:.1f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
