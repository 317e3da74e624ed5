"""Networks with injected convolution and normalization, and a summary of their costs."""

from wsbcn_flax.models._blocks import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck
from wsbcn_flax.models._cifar_resnet import (
    WRN28_10,
    CifarResNet,
    PreResNet110,
    PreResNet164,
    ResNeXt29_8x64d,
)
from wsbcn_flax.models._densenet import DenseNet, DenseNetBC100_12
from wsbcn_flax.models._resnet import (
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
    ResNeXt50_32x4d,
    ResNeXt101_32x4d,
)
from wsbcn_flax.models._summary import ModelSummary, summarize
from wsbcn_flax.models._vgg import VGG, VGG16, VGG19

__all__ = [
    "VGG",
    "VGG16",
    "VGG19",
    "WRN28_10",
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "DenseNet",
    "DenseNetBC100_12",
    "ModelSummary",
    "PreActBlock",
    "PreActBottleneck",
    "PreResNet110",
    "PreResNet164",
    "ResNeXt29_8x64d",
    "ResNeXt50_32x4d",
    "ResNeXt101_32x4d",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "summarize",
]
