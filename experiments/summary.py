"""Prints parameters, operations and memory of networks: `python -m experiments.summary`."""

import functools
import sys
from pathlib import Path

from experiments._command import make_main
from experiments._image_data import PUBLISHED_FACTS
from experiments._models import make_model
from experiments._tables import Column, check_writable
from experiments.recipes import MODELS, get_recipe
from wsbcn_flax import WSConv
from wsbcn_flax.models import ModelSummary, summarize
from wsbcn_flax.training.writers import write_json

_COLUMNS: dict[str, Column] = {
    "network": ("network", str),
    "parameters": ("parameters", "{:,}".format),
    "flops": ("GFLOPs", lambda x: f"{x / 1e9:.2f}"),
    "activation_bytes": ("activations MB", lambda x: f"{x / 1e6:.1f}"),
}


def summary(
    *,
    models: tuple[str, ...] = (*MODELS["imagenet"], *MODELS["cifar10"]),
    norm: str = "bcn_ws",
    json: Path | None = None,
) -> None:
    """Prints the parameters, operations and activation memory of networks.

    Args:
        models: Networks, named as in a recipe's name; all by default. ImageNet networks take
            224x224 images and have 1000 classes. CIFAR networks take 32x32 images and have 10.
        norm: Normalization and weights, {norm}[_{weight}] as in a recipe's name.
        json: File to write the numbers to.
    """
    check_writable(json)
    print(f"{norm}: one image in float32, 2 FLOPs a multiply-add")
    print("".join(f"{heading:>18}" for heading, _ in _COLUMNS.values()))
    summaries = {}
    for name in models:
        row = summaries[name] = summarize_model(name, norm)._asdict()
        cells = (show(({"network": name} | row)[key]) for key, (_, show) in _COLUMNS.items())
        # Printed row by row, since deep networks take seconds each.
        print("".join(f"{cell:>18}" for cell in cells), flush=True)
    if json is not None:
        write_json(json, {"norm": norm, "models": summaries})


def summarize_model(name: str, norm: str) -> ModelSummary:
    """Returns the summary of a network as its recipe builds it.

    Raises:
        ValueError: For an unknown network or normalization.
    """
    data = "imagenet" if name in MODELS["imagenet"] else "cifar10"
    recipe, facts = get_recipe(f"{data}_{name}_{norm}"), PUBLISHED_FACTS[data]
    model = make_model(recipe, num_classes=len(facts.class_names))
    if recipe.weight.kind != "none":
        # In training a transform standardizes; here the layers do, so that it is counted too.
        model = model.clone(conv=functools.partial(WSConv, preset=recipe.weight.convention))
    return summarize(model, facts.image_shape)


main = make_main(summary)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
