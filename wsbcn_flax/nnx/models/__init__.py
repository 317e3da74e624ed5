"""Residual networks in NNX with the same parameters as those of ``wsbcn_flax.models``."""

from wsbcn_flax.nnx.models._blocks import BasicBlock, Bottleneck
from wsbcn_flax.nnx.models._cifar_resnet import CifarResNet
from wsbcn_flax.nnx.models._resnet import (
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
    ResNeXt50_32x4d,
    ResNeXt101_32x4d,
)

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "ResNeXt50_32x4d",
    "ResNeXt101_32x4d",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "ResNet152",
]
