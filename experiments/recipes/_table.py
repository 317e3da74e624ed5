"""The rows of recipe tables."""

import dataclasses
from typing import NamedTuple

from wsbcn_flax.training import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A network's schedule: SGD with momentum 0.9 from a rate of 0.1, in steps.

    Attributes:
        epochs: Length of training.
        milestones: Epochs at which the learning rate is multiplied by ``decay``.
        batch: Number of images in a step.
        groups: Number of groups of group and batch-channel normalization.
        weight_decay: Weight decay of all parameters, scales and biases included.
        decay: Factor of each milestone.
    """

    epochs: float
    milestones: tuple[float, ...]
    batch: int
    groups: int
    weight_decay: float = 1e-4
    decay: float = 0.1

    @property
    def optim(self) -> OptimizerConfig:
        """The optimizer's configuration."""
        return OptimizerConfig(
            learning_rate=0.1,
            schedule="step",
            milestones=tuple(map(float, self.milestones)),
            decay=self.decay,
            weight_decay=self.weight_decay,
            decays_everything=True,
        )


class Published(NamedTuple):
    """The published result that a recipe repeats.

    Attributes:
        error: Errors in percent.
        source: Where they are published.
        flops: Floating-point operations of the whole training, in the convolutions; None where
            they were not counted.
    """

    error: str
    source: str
    flops: float | None
