"""The rows of recipe tables."""

from typing import NamedTuple

from experiments._classification import ClassificationRecipe
from experiments._recipe import DataConfig, ModelConfig, NormConfig
from wsbcn_flax.training import BatchConfig, OptimizerConfig


def step_recipe(
    data: DataConfig,
    model: str,
    *,
    epochs: float,
    milestones: tuple[float, ...],
    batch: int,
    groups: int,
    weight_decay: float = 1e-4,
    decay: float = 0.1,
) -> ClassificationRecipe:
    """Returns a recipe of SGD with momentum 0.9 and a learning rate that falls from 0.1 in steps.

    The rate is multiplied by ``decay`` at ``milestones``, in epochs. Weight decay applies to all
    parameters, scales and biases included.
    """
    return ClassificationRecipe(
        data=data,
        model=ModelConfig(name=model),
        norm=NormConfig(groups=groups),
        batch=BatchConfig(size=batch, loop="auto"),
        optim=OptimizerConfig(
            learning_rate=0.1,
            schedule="step",
            milestones=milestones,
            decay=decay,
            weight_decay=weight_decay,
            decays_everything=True,
        ),
        epochs=epochs,
    )


class Published(NamedTuple):
    """The published result that a recipe repeats.

    Attributes:
        result: Errors in percent, or average precision.
        source: Title of the publication.
        flops: Floating-point operations of the whole training, in the convolutions; None where
            they were not counted.
    """

    result: str
    source: str
    flops: float | None
