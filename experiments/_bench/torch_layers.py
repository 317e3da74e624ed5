"""PyTorch's normalization layers in training, at the shapes of ours. Needs the extra ``torch``."""
# pyright: reportMissingImports=false

import functools
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments._bench.arrays import Shape, normal_arrays
from experiments._bench.timing import Call, Key
from experiments._bench.torch_extra import MEMORY_FORMATS, in_format

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def torch_layer_calls(num_groups: int, shape: Shape) -> dict[Key, Call]:
    """As ``layer_calls``, of the same input and cotangent; every layer in both memory formats."""
    channels = shape[-1]
    layers = {
        "torch_batch_norm": lambda: nn.BatchNorm2d(channels),
        "torch_group_norm": lambda: nn.GroupNorm(num_groups, channels),
        "torch_naive_bcn": lambda: nn.Sequential(
            nn.BatchNorm2d(channels), nn.GroupNorm(num_groups, channels)
        ),
    }
    arrays = normal_arrays(np.random.default_rng(0), shape, shape)
    calls: dict[Key, Call] = {}
    for name, make in layers.items():
        for memory_format in MEMORY_FORMATS:
            layer = make()
            x, cotangent = (to_torch(array, memory_format) for array in arrays)
            key = in_format(name, memory_format)
            calls[key, "forward"] = functools.partial(_forward, layer, x)
            calls[key, "forward_backward"] = functools.partial(
                _forward_backward, layer, x.clone().requires_grad_(), cotangent
            )
    return calls


def to_torch(array: np.ndarray, memory_format: str) -> Any:
    """A tensor [B, C, H, W] of an array [B, H, W, C], in "contiguous" or "channels_last" format."""
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    return tensor.contiguous(memory_format=_FORMATS[memory_format])


def _forward(layer, x):
    with torch.no_grad():
        return layer(x)


def _forward_backward(layer, x, cotangent):
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, (x, *layer.parameters()), cotangent)
