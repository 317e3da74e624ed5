"""SGD with momentum, weight decay on kernels only, and learning-rate schedules in epochs."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import optax

Schedule = Literal["constant", "step", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with momentum, as the authors train: the learning rate multiplies the momentum buffer.

    Attributes:
        learning_rate: at its peak.
        momentum: of the buffer, 0 to below 1.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: added to the gradient of kernels, times the kernel.
        decays_everything: whether scales and biases decay too, as they do in PyTorch's SGD.
        schedule: after warm-up: "constant", "step" (times ``decay`` at each milestone) or "cosine"
            (to zero at the end of training).
        warmup_epochs: epochs of linear growth from zero.
        milestones: epochs at which "step" decays, counted from the start of training.
        decay: factor of each "step".

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> from wsbcn_flax.training import OptimizerConfig
        >>> config = OptimizerConfig(schedule="step", milestones=(30, 60))
        >>> schedule = config.make_schedule(steps_per_epoch=10, epochs=90)
        >>> [round(float(schedule(step)), 4) for step in (0, 300, 600)]
        [0.1, 0.01, 0.001]
    """

    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decays_everything: bool = False
    schedule: Schedule = "cosine"
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = ()
    decay: float = 0.1

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, received {self.learning_rate}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), received {self.momentum}.")
        if self.weight_decay < 0 or self.warmup_epochs < 0:
            raise ValueError(
                "weight_decay and warmup_epochs must not be negative, received "
                f"{self.weight_decay} and {self.warmup_epochs}."
            )
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"schedule must be one of {get_args(Schedule)}, received {self.schedule!r}."
            )
        if self.milestones and self.schedule != "step":
            raise ValueError(
                f'milestones belong to schedule="step", received {self.milestones} with '
                f"schedule={self.schedule!r}."
            )

    def make_schedule(self, *, steps_per_epoch: int, epochs: float) -> optax.Schedule:
        """The learning rate as a function of the step.

        Raises:
            ValueError: if warm-up does not end before training does.
        """
        warmup, total = (round(e * steps_per_epoch) for e in (self.warmup_epochs, epochs))
        if total <= warmup:
            raise ValueError(
                f"Training must outlast its warm-up, received {epochs} epochs ({total} steps) of "
                f"which {self.warmup_epochs} ({warmup} steps) warm up."
            )
        match self.schedule:
            case "constant":
                main = optax.constant_schedule(self.learning_rate)
            case "step":
                steps = [round(epoch * steps_per_epoch) - warmup for epoch in self.milestones]
                main = optax.piecewise_constant_schedule(
                    self.learning_rate, dict.fromkeys(steps, self.decay)
                )
            case "cosine":
                main = optax.cosine_decay_schedule(self.learning_rate, total - warmup)
        ramp = optax.linear_schedule(0.0, self.learning_rate, warmup)
        return optax.join_schedules([ramp, main], [warmup]) if warmup else main

    def make(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """The optimizer that follows ``schedule``."""
        mask = None if self.decays_everything else kernel_mask
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay, mask=mask),
            optax.sgd(schedule, self.momentum or None, self.nesterov),
        )


def kernel_mask(params: Any) -> Any:
    """True at the leaves named ``kernel``, which weight decay applies to.

    Example:
        >>> from wsbcn_flax.training import kernel_mask
        >>> kernel_mask({"conv": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0}})
        {'conv': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )
