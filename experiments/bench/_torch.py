"""PyTorch's normalization layers, and its training step of ResNet-50 with GN+WS.

Importing this module takes the extra ``torch``. Every call is made in both memory formats.
"""
# pyright: reportMissingImports=false

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from experiments.bench._timing import Call, Key

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_EPSILON = 1e-5


def facts() -> str:
    """Describes in one line what PyTorch's times depend on."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def layer_calls(num_groups: int, arrays: Sequence[np.ndarray]) -> dict[Key, Call]:
    """Makes the calls of layers for an input and a cotangent, named "NAME/FORMAT"."""
    channels = arrays[0].shape[-1]
    norms = {
        "torch_batch_norm": lambda: nn.BatchNorm2d(channels),
        "torch_group_norm": lambda: nn.GroupNorm(num_groups, channels),
        "torch_naive_bcn": lambda: nn.Sequential(
            nn.BatchNorm2d(channels), nn.GroupNorm(num_groups, channels)
        ),
    }
    calls: dict[Key, Call] = {}
    for name, make in norms.items():
        for memory_format in _FORMATS:
            layer = make()
            x, cotangent = (_to_torch(array, memory_format) for array in arrays)
            key, inputs = f"{name}/{memory_format}", x.clone().requires_grad_()
            calls[key, "forward"] = functools.partial(torch.no_grad()(layer), x)
            calls[key, "forward_backward"] = functools.partial(
                _forward_backward, layer, inputs, cotangent
            )
    return calls


def _to_torch(array: np.ndarray, memory_format: str) -> Any:
    """A tensor [B, C, H, W] of an array [B, H, W, C]."""
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    return tensor.contiguous(memory_format=_FORMATS[memory_format])


def _forward_backward(layer: nn.Module, x: Any, cotangent: Any) -> Any:
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, (x, *layer.parameters()), cotangent)


class StandardizedConv(nn.Conv2d):
    """A convolution with Weight Standardization by the batch normalization kernel.

    It is the fastest way PyTorch has, which timm uses. A weight turns that kernel's biased variance
    into the unbiased one of ``wsbcn_flax.standardize``.
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


_norm = functools.partial(nn.GroupNorm, 32)


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
        stage_sizes: Numbers of blocks in the stages; ResNet-50's by default.
        num_classes: Number of features of the head.
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
        """Returns logits [B, num_classes] of images [B, 3, H, W]."""
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = functional.max_pool2d(x, 3, 2, 1)
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def training_call(model: nn.Module, batch: Mapping[str, np.ndarray], memory_format: str) -> Call:
    """Makes a training step, SGD with momentum, that continues from where its last call ended.

    Args:
        model: Model to train; its memory format becomes the images'.
        batch: Images [B, H, W, C] and labels [B].
        memory_format: "contiguous" or "channels_last".

    Returns:
        The function that updates all parameters and returns the loss.
    """
    to_format: Any = model.train().to  # Its overloads do not know memory_format alone.
    to_format(memory_format=_FORMATS[memory_format])
    images = _to_torch(batch["image"], memory_format)
    labels = torch.from_numpy(batch["label"]).long()
    # The rate is ours, see TrainingCall; one fused kernel updates all parameters.
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def step_calls(key: Key, batch: Mapping[str, np.ndarray]) -> dict[Key, Call]:
    """Makes steps of ResNet-50, named "NAME/FORMAT"."""
    name, which = key
    return {
        (f"{name}/{each}", which): training_call(GroupNormResNet(), batch, each)
        for each in _FORMATS
    }
