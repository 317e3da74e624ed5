"""Reference for checkpoint imports: the authors' networks in PyTorch, after the papers.

`python tests/torch_resnet.py` (with torch) writes the golden logits, with which
`test_checkpoints.py` compares where torch is not installed.
"""

import functools
from pathlib import Path

import numpy as np
from flax import traverse_util

from wsbcn_flax.transforms import checkpoint_spec, export_checkpoint, import_checkpoint
from wsbcn_flax.transforms._checkpoints import _entries

GOLDEN = Path(__file__).parent / "golden" / "import_logits.npz"
NAMES = ("R-50-GN-WS", "X-50-32x4d-GN-WS", "R-50-BCN-WS", "resnet18")


@functools.cache
def images() -> np.ndarray:
    # Values are so small that the epsilon of the stem's normalization matters.
    return 0.001 * np.random.RandomState(1).normal(size=(2, 96, 96, 3)).astype(np.float32)


@functools.cache
def random_variables(name):
    """Returns the variables imported from ``random_state_dict``."""
    return import_checkpoint(random_state_dict(name), name)


def random_state_dict(name):
    """Makes arrays in PyTorch's layout, none of them at its initial values."""
    # numpy guarantees that the numbers of this generator, unlike default_rng's, never change.
    rng = np.random.RandomState(0)
    arrays = export_checkpoint(numbered_variables(name), name)
    return {
        key: _random(rng, key.rpartition(".")[2], array.shape).astype(array.dtype)
        for key, array in sorted(arrays.items())
    }


def _random(rng, leaf, shape):
    numbers = rng.normal(size=shape)
    if leaf == "num_batches_tracked":
        return np.array(1234)
    if leaf == "running_var":
        return 10 ** rng.uniform(-2, 0, size=shape)
    if leaf == "weight" and len(shape) == 4:
        # Channels are large to tiny; otherwise the next normalization hides the epsilon of WS.
        channels = 10 ** rng.uniform(-3, 0, size=(shape[0], 1, 1, 1))
        return numbers * np.sqrt(2 / np.prod(shape[1:])) * channels
    if leaf == "weight" and len(shape) != 2:
        return 1 + 0.3 * numbers
    return 0.3 * numbers


def numbered_variables(name):
    """Makes variables whose values identify their place; all values of an array differ."""
    leaves = {
        entry.path: (i + np.arange(entry.array.size).reshape(entry.array.shape)).astype(np.float32)
        for i, entry in enumerate(_entries(name))
    }
    return {"batch_stats": {}, **traverse_util.unflatten_dict(leaves)}


def logits(name: str) -> np.ndarray:
    """Computes PyTorch's logits of the images in float64 evaluation, with the random arrays."""
    import torch

    model = make_model(name)
    arrays = random_state_dict(name)
    model.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
    with torch.no_grad():
        x = torch.from_numpy(images().transpose(0, 3, 1, 2)).double()
        return model.double().eval()(x).numpy().astype(np.float32)


def make_model(name):
    """Makes a module whose state dict has the published keys."""
    import torch
    from torch import nn
    from torch.nn import functional

    spec = checkpoint_spec(name)

    class WSConv(nn.Conv2d):
        def forward(self, x):
            weight = self.weight
            if spec.preset is not None:
                weight = weight - weight.mean((1, 2, 3), keepdim=True)
                var = weight.square().sum((1, 2, 3), keepdim=True) / (weight[0].numel() - 1)
                weight = (
                    weight
                    / {
                        "bcn": lambda: torch.sqrt(var + 1e-5),
                        "official": lambda: torch.sqrt(var) + 1e-5,
                    }[spec.preset]()
                )
            return functional.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups)

    class BCN(nn.Module):
        def __init__(self, features):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 32, 1))
            self.bias = nn.Parameter(torch.zeros(1, 32, 1))
            self.pbn = nn.BatchNorm2d(features)

        def forward(self, x):
            y = self.pbn(x).reshape(len(x), 32, -1)
            var, mean = torch.var_mean(y, -1, correction=0, keepdim=True)
            return ((y - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias).reshape(x.shape)

    norm = {"gn": functools.partial(nn.GroupNorm, 32), "bn": nn.BatchNorm2d, "bcn": BCN}[spec.norm]

    def conv(inputs, outputs, size, stride=1, groups=1):
        return WSConv(inputs, outputs, size, stride, (size - 1) // 2, groups=groups, bias=False)

    class Block(nn.Module):
        """conv1 norm1 relu conv2 norm2 (relu conv3 norm3) + shortcut, relu; stride on a 3x3."""

        def __init__(self, inputs, outputs, stride, kernels):
            super().__init__()
            self.count = len(kernels)
            for i, (features, size, groups) in enumerate(kernels, start=1):
                before = inputs if i == 1 else kernels[i - 2][0]
                strides = stride if size == 3 and (i == 1 or self.count == 3) else 1
                setattr(self, f"conv{i}", conv(before, features, size, strides, groups))
                setattr(self, f"bn{i}", norm(features))
            self.downsample = nn.Identity()
            if stride != 1 or inputs != outputs:
                self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))

        def forward(self, x):
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = functional.relu(y) if i < self.count else y
            return functional.relu(y + self.downsample(x))

    def kernels(outputs):
        if name == "resnet18":
            return [(outputs, 3, 1), (outputs, 3, 1)]
        groups, inner = (32, outputs // 2) if name.startswith("X") else (1, outputs // 4)
        return [(inner, 1, 1), (inner, 3, groups), (outputs, 1, 1)]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv(3, 64, 7, 2), norm(64)
            inputs, first = 64, 64 if name == "resnet18" else 256
            sizes = (2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3)
            for stage, size in enumerate(sizes):
                outputs, blocks = first * 2**stage, []
                for block in range(size):
                    stride = 2 if stage > 0 and block == 0 else 1
                    blocks.append(Block(inputs, outputs, stride, kernels(outputs)))
                    inputs = outputs
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(inputs, 1000)

        def forward(self, x):
            x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            for stage in range(1, 5):
                x = getattr(self, f"layer{stage}")(x)
            return self.fc(x.mean((2, 3)))

    return Net()


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **{name: logits(name) for name in NAMES})
