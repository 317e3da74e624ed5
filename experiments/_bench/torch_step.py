"""A training step of ResNet-50 with GN+WS in PyTorch. Needs the extra ``torch``."""
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from experiments._bench.timing import Call
from experiments._bench.torch_extra import MEMORY_FORMATS, in_format
from experiments._bench.torch_layers import to_torch

_EPSILON = 1e-5


class StandardizedConv(nn.Conv2d):
    """A convolution with Weight Standardization by the batch normalization kernel.

    The fastest way PyTorch has, which timm uses; a weight turns that kernel's biased variance into
    ``wsbcn_flax.standardize``'s unbiased one.
    """

    def forward(self, input: Any) -> Any:
        """Convolves images [B, I, H, W]."""
        outputs, fan_in = len(self.weight), self.weight[0].numel()
        biased = (fan_in - 1) / fan_in
        kernel = functional.batch_norm(
            self.weight.reshape(1, outputs, fan_in),
            None,
            None,
            weight=self.weight.new_full((outputs,), biased**0.5),
            training=True,
            eps=_EPSILON * biased,
        )
        kernel = kernel.reshape_as(self.weight)
        return functional.conv2d(input, kernel, None, self.stride, self.padding)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    return StandardizedConv(inputs, outputs, size, stride, size // 2, bias=False)


def _norm(features: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, features)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        inner = outputs // 4
        self.conv1, self.bn1 = _conv(inputs, inner, 1), _norm(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride), _norm(inner)
        self.conv3, self.bn3 = _conv(inner, outputs, 1), _norm(outputs)
        nn.init.zeros_(cast(nn.Parameter, self.bn3.weight))  # As in our network.
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), _norm(outputs))

    def forward(self, x: Any) -> Any:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        return functional.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


class GroupNormResNet(nn.Module):
    """The bottleneck network of ``wsbcn_flax.models.ResNet``, its modules named as torchvision's.

    Args:
        stage_sizes: blocks in each stage; ResNet-50's by default.
        num_classes: features of the head.
    """

    def __init__(self, stage_sizes: Sequence[int] = (3, 4, 6, 3), num_classes: int = 1000):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 64, 7, 2), _norm(64)
        inputs, self.stages = 64, len(stage_sizes)
        for stage, size in enumerate(stage_sizes):
            blocks = []
            for block in range(size):
                outputs, stride = 256 * 2**stage, 2 if stage > 0 and block == 0 else 1
                blocks.append(_Bottleneck(inputs, outputs, stride))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Any) -> Any:
        """Logits [B, num_classes] of images [B, 3, H, W]."""
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = functional.max_pool2d(x, 3, 2, 1)
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


class TorchTrainingCall:
    """A training step, SGD with momentum, that goes on from where its last call left off.

    Args:
        model: to train; its memory format becomes the images'.
        batch: images [B, H, W, C] and labels [B].
        memory_format: "contiguous" or "channels_last".
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, np.ndarray], memory_format: str):
        if memory_format == "channels_last":
            to_format: Any = model.to  # Its overloads do not know this one.
            to_format(memory_format=torch.channels_last)
        self._model = model.train()
        self._images = to_torch(batch["image"], memory_format)
        self._labels = torch.from_numpy(batch["label"]).long()
        # The rate is ours, see TrainingCall; one fused kernel updates all parameters.
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
        )

    def __call__(self) -> float:
        """The loss, after the parameters are updated."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(self._model(self._images), self._labels)
        loss.backward()
        self._optimizer.step()
        return loss.item()


def torch_step_calls(name: str, batch: Mapping[str, np.ndarray]) -> dict[str, Call]:
    """A step of ResNet-50 in each memory format, named by ``in_format``."""
    return {
        in_format(name, memory_format): TorchTrainingCall(GroupNormResNet(), batch, memory_format)
        for memory_format in MEMORY_FORMATS
    }
