"""The public networks, and normalizations to inject, for tests that run over all of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from wsbcn_flax import BatchChannelNorm, models

# With the other order, training equals evaluation while the running statistics are fresh.
Bcn = functools.partial(BatchChannelNorm, num_groups=4, order="update_first")
NORMS = {
    "batch_norm": nn.BatchNorm,
    "group_norm": functools.partial(nn.GroupNorm, num_groups=4),
    "layer_norm": nn.LayerNorm,
    "bcn": Bcn,
    "bcn_per_channel": functools.partial(Bcn, affine="channel"),
}
# Named networks such as ResNet50: partials, which take every option of their class.
NETWORKS = {
    name: getattr(models, name)
    for name in models.__all__
    if isinstance(getattr(models, name), functools.partial)
}


def image_size(model: nn.Module) -> int:
    """Returns the image size of the dataset with the network's number of classes."""
    return 224 if model.num_classes == 1000 else 32


def abstract_variables(model: nn.Module, size: int = 16):
    """Returns the shapes and dtypes of the model's variables, without computing them."""
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), jnp.ones((2, size, size, 3)))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
