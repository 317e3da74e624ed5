"""VGG: shapes, number of parameters, and images of other sizes than CIFAR's."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from networks import abstract_variables, count

from wsbcn_flax.models import VGG, VGG16, VGG19


@pytest.mark.parametrize(("network", "depth"), [(VGG16, 16), (VGG19, 19)])
def test_has_the_layers_its_name_counts(network, depth):
    """One dense layer replaces the three of ImageNet's VGG."""
    params = abstract_variables(network(), 32)["params"]
    kernels = [path for path in traverse_util.flatten_dict(params) if path[-1] == "kernel"]
    assert len(kernels) == depth - 2


def test_number_of_parameters():
    """These are 3x3 kernels without bias, two numbers per normalized channel, and the head."""
    model = VGG(stage_sizes=(2, 1), stage_features=(6, 10), num_classes=3)
    expected = 9 * (3 * 6 + 6 * 6 + 6 * 10) + 2 * (6 + 6 + 10) + (10 + 1) * 3
    assert count(abstract_variables(model)["params"]) == expected


@pytest.mark.parametrize(("size", "last"), [(32, 1), (63, 1), (64, 2)])
def test_every_stage_halves_the_resolution(size, last):
    init = functools.partial(VGG16().init_with_output, train=False, capture_intermediates=True)
    images = jnp.ones((1, size, size, 3))
    logits, variables = jax.eval_shape(init, jax.random.key(0), images)
    assert logits.shape == (1, 10)
    for stage, features in enumerate((64, 128, 256, 512, 512), start=1):
        (y,) = variables["intermediates"][f"stage{stage}_conv2"]["__call__"]
        assert y.shape == (1, size, size, features)
        size //= 2
    assert size == last
