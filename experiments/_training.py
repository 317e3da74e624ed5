"""How each network is trained: the schedules of the codes whose results the recipes repeat."""

import dataclasses

from wsbcn_flax.training import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A network's schedule: SGD with momentum 0.9 from a rate of 0.1, in steps.

    Attributes:
        epochs: length of training.
        milestones: epochs at which the learning rate is multiplied by ``decay``.
        batch: images in a step.
        weight_decay: of all parameters, scales and biases included, as PyTorch's SGD applies it.
        decay: factor of each milestone.
        groups: of group and batch-channel normalization; divides every layer's channels.
    """

    epochs: float
    milestones: tuple[float, ...]
    batch: int
    weight_decay: float = 1e-4
    decay: float = 0.1
    groups: int = 32

    @property
    def optim(self) -> OptimizerConfig:
        """The optimizer's configuration."""
        return OptimizerConfig(
            learning_rate=0.1,
            schedule="step",
            milestones=self.milestones,
            decay=self.decay,
            weight_decay=self.weight_decay,
            decays_everything=True,
        )


# ImageNet: the authors' Weight Standardization and Batch-Channel Normalization repositories.
_IMAGENET_90 = Training(epochs=90.0, milestones=(30.0, 60.0), batch=256)
_IMAGENET_100 = Training(epochs=100.0, milestones=(30.0, 60.0, 90.0), batch=128)
IMAGENET: dict[str, Training] = {
    "resnet18": _IMAGENET_90,
    "resnet34": _IMAGENET_90,
    "resnet50": _IMAGENET_90,
    "resnet101": _IMAGENET_100,
    "resnet152": _IMAGENET_100,
    "resnext50_32x4d": _IMAGENET_100,
    "resnext101_32x4d": _IMAGENET_100,
}

# CIFAR: bearpaw/pytorch-classification, the code base the authors forked, TRAINING.md. The groups
# are the most, up to 32, that divide the narrowest layer into groups of four or more channels.
_CIFAR_164 = Training(epochs=164.0, milestones=(81.0, 122.0), batch=128, groups=4)
_CIFAR_VGG = dataclasses.replace(_CIFAR_164, weight_decay=5e-4, groups=16)
CIFAR: dict[str, Training] = {
    **{f"resnet{depth}": _CIFAR_164 for depth in (20, 32, 44, 56, 110)},
    "preresnet110": _CIFAR_164,
    "preresnet164": _CIFAR_164,
    "resnext29_8x64d": Training(
        epochs=300.0, milestones=(150.0, 225.0), batch=128, weight_decay=5e-4, groups=16
    ),
    "wrn28_10": Training(
        epochs=200.0,
        milestones=(60.0, 120.0, 160.0),
        batch=128,
        weight_decay=5e-4,
        decay=0.2,
        groups=4,
    ),
    "vgg16": _CIFAR_VGG,
    "vgg19": _CIFAR_VGG,
    "densenet100_12": Training(epochs=300.0, milestones=(150.0, 225.0), batch=64, groups=6),
}
