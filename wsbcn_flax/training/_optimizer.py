"""SGD with momentum or AdamW, with learning-rate schedules in epochs."""

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import optax
from flax import nnx

Kind = Literal["sgd", "adamw"]
Schedule = Literal["constant", "step", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with momentum or AdamW, and the schedule of the learning rate.

    SGD is PyTorch's, as the authors train: the learning rate multiplies the momentum buffer, and
    weight decay is added to the gradient. AdamW adds it to the update.

    Attributes:
        kind: Optimizer, "sgd" or "adamw".
        learning_rate: Learning rate at its peak.
        momentum: Momentum of SGD, and beta 1 of AdamW, from 0 to below 1.
        nesterov: Whether SGD's momentum is Nesterov's.
        weight_decay: Weight decay of kernels.
        decays_everything: whether scales and biases decay too, as they do in PyTorch's SGD.
        decays_biases: whether biases are part of everything; detectors leave them out.
        bias_factor: Factor of the learning rate of biases; detectors take 2.
        frozen: Shell patterns of the paths of parameters that stay as they are, decay included,
            such as "backbone/stem_*".
        schedule: after warm-up: "constant", "step" (times ``decay`` at each milestone) or "cosine"
            (to zero at the end of training).
        warmup_epochs: epochs of linear growth.
        warmup_start: Fraction of the learning rate that it grows from; detectors take 1/3.
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

    kind: Kind = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decays_everything: bool = False
    decays_biases: bool = True
    bias_factor: float = 1.0
    frozen: tuple[str, ...] = ()
    schedule: Schedule = "cosine"
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0
    milestones: tuple[float, ...] = ()
    decay: float = 0.1

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, received {self.kind!r}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, received {self.learning_rate}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), received {self.momentum}.")
        if self.weight_decay < 0 or self.warmup_epochs < 0:
            raise ValueError(
                "weight_decay and warmup_epochs must not be negative, received "
                f"{self.weight_decay} and {self.warmup_epochs}."
            )
        if not (0 <= self.warmup_start <= 1 and self.bias_factor > 0):
            raise ValueError(
                "warmup_start must be in [0, 1] and bias_factor positive, received "
                f"{self.warmup_start} and {self.bias_factor}."
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
        ramp = optax.linear_schedule(
            self.warmup_start * self.learning_rate, self.learning_rate, warmup
        )
        return optax.join_schedules([ramp, main], [warmup]) if warmup else main

    def make(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """The optimizer that follows ``schedule``.

        It raises a ValueError, when it first sees the parameters, for a pattern of ``frozen`` that
        matches none.
        """
        mask = self._decay_mask
        if self.kind == "adamw":
            adam = optax.adamw(schedule, self.momentum, weight_decay=self.weight_decay, mask=mask)
            steps = [adam]
        else:
            steps = [
                optax.add_decayed_weights(self.weight_decay, mask=mask),
                optax.sgd(schedule, self.momentum or None, self.nesterov),
            ]
        if self.bias_factor != 1:
            steps.append(optax.masked(optax.scale(self.bias_factor), _bias_mask))
        if self.frozen:
            steps.append(optax.masked(optax.set_to_zero(), self._frozen_mask))
        return optax.chain(*steps)

    def _decay_mask(self, params: Any) -> Any:
        if not self.decays_everything:
            return kernel_mask(params)
        return _map_paths(self._decays, params)

    def _decays(self, path: str) -> bool:
        """Whether a parameter decays where everything does; constants of "aws" are no weights."""
        name = path.rpartition("/")[2]
        return not name.startswith("constant_") and (
            self.decays_biases or not name.endswith("bias")
        )

    def _frozen_mask(self, params: Any) -> Any:
        paths = _map_paths(lambda path: path, params)
        for pattern in self.frozen:
            if not fnmatch.filter(jax.tree.leaves(paths), pattern):
                raise ValueError(
                    f"A pattern of frozen must match a parameter, received {pattern!r} for "
                    f"parameters such as {jax.tree.leaves(paths)[0]!r}."
                )
        return jax.tree.map(
            lambda path: any(fnmatch.fnmatchcase(path, p) for p in self.frozen), paths
        )


def kernel_mask(params: Any) -> Any:
    """True at the leaves named ``kernel``, which weight decay applies to.

    Example:
        >>> from wsbcn_flax.training import kernel_mask
        >>> kernel_mask({"conv": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0}})
        {'conv': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return _map_paths(lambda path: path.rpartition("/")[2] == "kernel", params)


def _bias_mask(params: Any) -> Any:
    """True at biases, those of batch-channel normalization included."""
    return _map_paths(lambda path: path.endswith("bias"), params)


def _map_paths(function: Callable[[str], Any], params: Any) -> Any:
    """A tree of the function's values at paths such as "conv/kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: function("/".join(str(getattr(key, "key", key)) for key in path)),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
