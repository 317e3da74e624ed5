"""The networks whose whole training step is measured."""

from experiments._config import Recipe
from experiments._recipes import get_recipe
from experiments._variants import with_norm

NORMS = ("bn", "gn", "naive_bcn", "bcn", "gn_ws", "bcn_ws")
QUICK_RECIPE = "digits_resnet8_bcn_ws"


def recipes_with_norms(recipe: str, norms: tuple[str, ...]) -> dict[str, Recipe]:
    """The recipe with each of the normalizations, by their names.

    Raises:
        ValueError: for an unknown recipe or normalization, or without bn to compare with.
    """
    if "bn" not in norms:
        raise ValueError(
            f"norms must name bn, which all are compared with, received {', '.join(norms)}."
        )
    return {name: with_norm(get_recipe(recipe), name) for name in norms}
