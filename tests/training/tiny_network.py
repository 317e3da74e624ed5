"""The smallest network with every kind of parameter, and batches for it."""

import flax.linen as nn
import numpy as np

from wsbcn_flax.models._layers import bind_mode


class TinyNet(nn.Module):
    """A network of two normalized convolutions and a head, which is fast to compile."""

    norm: object
    features: int = 8

    @nn.compact
    def __call__(self, images, *, train):
        norm = bind_mode(self.norm, train=train)
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv1")(images)
        x = nn.relu(norm(name="norm1")(x))
        x = nn.Conv(self.features, (3, 3), use_bias=False, name="conv2")(x)
        x = nn.relu(norm(name="norm2")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def make_batch(seed=0, size=16):
    """Makes images and labels of ten classes."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(0.5, 2.0, (size, 8, 8, 3)).astype(np.float32),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }
