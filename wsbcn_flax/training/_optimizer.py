"""SGD with momentum or AdamW, with learning-rate schedules in epochs."""

import dataclasses
import fnmatch
import itertools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import optax
from flax import nnx
from flax.core import meta
from jax.tree_util import GetAttrKey

Kind = Literal["sgd", "adamw"]
Schedule = Literal["constant", "step", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, SGD with momentum or AdamW, and the schedule of its learning rate.

    SGD follows PyTorch, with which the authors train: the learning rate multiplies the momentum
    buffer, and weight decay is added to the gradient. AdamW adds weight decay to the update.

    Attributes:
        kind: Optimizer, "sgd" or "adamw".
        learning_rate: Peak learning rate.
        momentum: Momentum of SGD, and beta 1 of AdamW, from 0 to below 1.
        nesterov: Whether SGD uses Nesterov momentum.
        weight_decay: Weight decay of kernels.
        decays_everything: Whether scales and biases decay too, as they do in PyTorch's SGD.
        decays_biases: Whether ``decays_everything`` includes biases; for detectors it does not.
        bias_factor: Factor on the learning rate of biases; 2 for detectors.
        frozen: Shell patterns of the paths of parameters that stay unchanged, without decay, such
            as "backbone/stem_*".
        schedule: Schedule after warm-up: "constant", "step" (times ``decay`` at each milestone) or
            "cosine" (to zero at the end of training).
        warmup_epochs: Number of epochs in which the learning rate grows linearly.
        warmup_start: Fraction of the learning rate at which warm-up starts; 1/3 for detectors.
        milestones: Epochs at which "step" decays, counted from the start of training.
        decay: Factor of each "step".

    Raises:
        ValueError: For a value outside its range.

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

        if any(a >= b for a, b in itertools.pairwise((0.0, *self.milestones))):
            raise ValueError(
                f"milestones must be positive epochs that increase, received {self.milestones}."
            )

    def make_schedule(self, *, steps_per_epoch: int, epochs: float) -> optax.Schedule:
        """Makes the learning rate as a function of the step.

        Raises:
            ValueError: If warm-up does not end before training does.
        """
        warmup, total = (round(e * steps_per_epoch) for e in (self.warmup_epochs, epochs))
        if total <= warmup:
            raise ValueError(
                f"Training must outlast its warm-up, received {epochs} epochs ({total} steps) of "
                f"which {self.warmup_epochs} ({warmup} steps) warm up. Train longer, or lower "
                "optim.warmup_epochs."
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
        """Makes the optimizer that follows ``schedule``.

        The optimizer raises a ValueError at its initialization if a pattern of ``frozen`` matches
        no parameter.
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
        """Whether ``decays_everything`` includes a parameter; constants of "aws" are excluded."""
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
    """Returns a tree, True at the leaves named ``kernel``, to which weight decay applies.

    Example:
        >>> from wsbcn_flax.training import kernel_mask
        >>> kernel_mask({"conv": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0}})
        {'conv': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    return _map_paths(lambda path: path.rpartition("/")[2] == "kernel", params)


def _bias_mask(params: Any) -> Any:
    """Returns a tree that is True at biases, including those of batch-channel normalization."""
    return _map_paths(lambda path: path.endswith("bias"), params)


def path_of(path: Any) -> str:
    """Returns a parameter's path, such as "conv/kernel", without the attribute inside a box."""
    is_inside = isinstance(path[-1], GetAttrKey) and path[-1].name == "value"
    return jax.tree_util.keystr(path[:-1] if is_inside else path, simple=True, separator="/")


def _map_paths(function: Callable[[str], Any], params: Any) -> Any:
    """Returns a tree of the function's values at paths such as "conv/kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: function(path_of(path)),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable | meta.AxisMetadata),
    )
