"""Networks with convolution and normalization injected."""

from wsbcn_flax.models._blocks import BasicBlock, PreActBlock
from wsbcn_flax.models._cifar_resnet import CifarResNet

__all__ = ["BasicBlock", "CifarResNet", "PreActBlock"]
