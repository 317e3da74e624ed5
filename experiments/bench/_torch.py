"""Calls of PyTorch's normalization layers and GN+WS ResNet-50 step, and of torchvision's RoIs.

Layers and step are measured in both memory formats, NCHW and NHWC.
"""
# pyright: reportMissingImports=false

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from experiments.bench._timing import Call, Key, Shape, normal_arrays
from experiments.bench.detection import NMS_THRESHOLD, STRIDE

_FORMATS = {"": torch.contiguous_format, "_nhwc": torch.channels_last}
_EPSILON = 1e-5


def layer_calls(num_groups: int, shape: Shape) -> dict[Key, Call]:
    """Makes training calls of the layers, on the same input and cotangent as for ours."""
    batch_norm, group_norm = nn.BatchNorm2d(shape[-1]), nn.GroupNorm(num_groups, shape[-1])
    norms = {
        "torch_batch_norm": batch_norm,
        "torch_group_norm": group_norm,
        "torch_naive_bcn": nn.Sequential(batch_norm, group_norm),
    }
    calls: dict[Key, Call] = {}
    for suffix, memory_format in _FORMATS.items():
        x, cotangent = (_to_torch(array, memory_format) for array in normal_arrays(shape, shape))
        x.requires_grad_()
        for name, norm in norms.items():
            forward = functools.partial(torch.no_grad()(norm), x)
            forward_backward = functools.partial(_forward_backward, norm, x, cotangent)
            calls[name + suffix, "forward"] = forward
            calls[name + suffix, "forward_backward"] = forward_backward
    return calls


def _to_torch(array: np.ndarray, memory_format: Any) -> Any:
    """Converts an array [B, H, W, C] to a tensor [B, C, H, W]."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).clone(memory_format=memory_format)


def _forward_backward(layer: nn.Module, x: Any, cotangent: Any) -> Any:
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, (x, *layer.parameters()), cotangent)


class WeightStandardization(nn.Module):
    """Weight Standardization of a kernel [O, I, H, W] by PyTorch's batch normalization.

    This is PyTorch's fastest way, and timm uses it. A weight turns the biased variance of batch
    normalization into the unbiased one of ``wsbcn_flax.standardize``.
    """

    def forward(self, kernel: Any) -> Any:
        """Returns the standardized kernel."""
        outputs, fan_in = len(kernel), kernel[0].numel()
        biased = (fan_in - 1) / fan_in
        rows = kernel.reshape(1, outputs, fan_in)
        scale = kernel.new_full((outputs,), biased**0.5)
        eps = _EPSILON * biased
        hat = functional.batch_norm(rows, None, None, weight=scale, training=True, eps=eps)
        return hat.reshape_as(kernel)


def resnet50_gn_ws() -> nn.Module:
    """Makes torchvision's ResNet-50 with GN+WS, the network of ``wsbcn_flax.models.ResNet50``."""
    norm = functools.partial(nn.GroupNorm, 32, eps=_EPSILON)
    model = torchvision.models.resnet50(norm_layer=norm, zero_init_residual=True)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            parametrize.register_parametrization(module, "weight", WeightStandardization())
    return model


def step_calls(name: str, batch: Mapping[str, np.ndarray]) -> dict[Key, Call]:
    """Makes training steps of ResNet-50 on images [B, H, W, C] and labels [B]."""
    return {
        (name + suffix, "step"): _training_call(batch, memory_format)
        for suffix, memory_format in _FORMATS.items()
    }


def _training_call(batch: Mapping[str, np.ndarray], memory_format: Any) -> Call:
    """Makes a step that continues from where its last call ended, and returns the loss."""
    model: Any = resnet50_gn_ws().train()
    model.to(memory_format=memory_format)
    images = _to_torch(batch["image"], memory_format)
    labels = torch.from_numpy(batch["label"]).long()
    # Our step has the same learning rate; one fused kernel updates all parameters.
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


def nms_calls(boxes: np.ndarray, scores: np.ndarray) -> dict[Key, Call]:
    """Makes the call of torchvision's suppression, which returns the indices that it keeps."""
    arguments = torch.from_numpy(boxes), torch.from_numpy(scores)
    call = functools.partial(torchvision.ops.nms, *arguments, NMS_THRESHOLD)
    return {("torch", "forward"): call}


def roi_calls(features: np.ndarray, cotangent: np.ndarray, boxes: np.ndarray) -> dict[Key, Call]:
    """Makes the calls of torchvision's RoIAlign on features [1, H, W, C]."""
    x, dy = (_to_torch(array, torch.contiguous_format) for array in (features, cotangent))
    x.requires_grad_()
    bins, rois = tuple(dy.shape[2:]), [torch.from_numpy(boxes)]

    def pool() -> Any:
        return torchvision.ops.roi_align(x, rois, bins, 1 / STRIDE, sampling_ratio=2)

    def forward_backward() -> Any:
        y = pool()
        return y.detach(), torch.autograd.grad(y, x, dy)

    return {
        ("torch", "forward"): torch.no_grad()(pool),
        ("torch", "forward_backward"): forward_backward,
    }
