"""Recipes of published results: documented, buildable, and trainable on data of their kind."""

import dataclasses
import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from oracles import normal

from experiments._data_specs import DATA_SPECS
from experiments._published import PUBLISHED
from experiments._recipes import get_recipe
from experiments._run import make_state, make_steps
from wsbcn_flax.training import Partition

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGENET = ("resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d")
CIFAR = ("resnet110", "preresnet110", "resnext29_8x64d", "wrn28_10")
ROWS = (
    *(f"imagenet_{model}_gn_ws" for model in IMAGENET),
    *(f"{data}_{model}_bn" for data in ("cifar10", "cifar100") for model in CIFAR),
)
# One of each family of networks.
FAMILIES = (
    "imagenet_resnet18_bcn_ws",
    "imagenet_resnext50_32x4d_gn_ws",
    "cifar10_resnet20_bcn_ws",
    "cifar100_preresnet110_bn",
    "cifar10_resnext29_8x64d_bcn_ws",
    "cifar10_wrn28_10_bcn_ws",
    "cifar10_vgg16_gn_ws",
    "cifar100_densenet100_12_gn_ws",
)


def on_one_device(recipe, image_shape):
    """The recipe's steps, and what makes its initial state."""
    spec = DATA_SPECS[recipe.data.name]
    steps = make_steps(
        recipe,
        Partition(mode="jit", devices=jax.devices()[:1]),
        num_classes=spec.num_classes,
        steps_per_epoch=spec.train_size // recipe.batch.size,
    )
    initialize = functools.partial(
        make_state,
        steps.task,
        steps.optimizer,
        0,
        transform=steps.transform,
        image_shape=image_shape,
    )
    return steps, initialize


def some_values(shape):
    """An array of a state: positive, as variances are, and about as large as kernels are."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return 0.1 * jnp.abs(normal(1, *shape.shape, dtype=shape.dtype))
    return jnp.zeros(shape.shape, shape.dtype)


def test_every_published_row_has_a_recipe_and_one_with_bcn_and_ws():
    with_bcn = [re.sub("_(gn_ws|bn)$", "_bcn_ws", name) for name in ROWS]
    assert set(PUBLISHED) == {*ROWS, *with_bcn}


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_documented(name):
    """The command is its own, the steps are its own, and the error says where it comes from."""
    recipe, text = PUBLISHED[name](), inspect.getdoc(PUBLISHED[name])
    assert recipe == get_recipe(name)
    assert f"\nCommand: python -m experiments.train {name}\n" in text
    assert re.search(r"\nExpected: (\d+\.\d+ %.* error: .*README|no verified number)", text)
    steps = round(recipe.epochs * (DATA_SPECS[recipe.data.name].train_size // recipe.batch.size))
    assert f"\nCost: {steps:,} steps of {recipe.batch.size} images, " in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_builds_initializes_and_traces(name):
    """The whole training step at the recipe's own size; one of each family runs, below."""
    recipe = PUBLISHED[name]()
    size, image_shape = recipe.batch.size, DATA_SPECS[recipe.data.name].image_shape
    steps, initialize = on_one_device(recipe, image_shape)
    state = jax.eval_shape(initialize)
    batch = {
        "image": jax.ShapeDtypeStruct((size, *image_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    new_state, metrics = jax.eval_shape(steps.train, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert set(metrics) == {"loss", "error", "grad_norm"}


@pytest.mark.parametrize("name", FAMILIES)
def test_takes_a_real_step(name):
    """One step of the whole network, on two images."""
    recipe = get_recipe(name)
    batch = dataclasses.replace(recipe.batch, size=2)
    image_shape = (32, 32, 3)
    steps, initialize = on_one_device(dataclasses.replace(recipe, batch=batch), image_shape)
    # Any values do, and compiling the initialization would take as long as the step.
    state = jax.tree.map(some_values, jax.eval_shape(initialize))
    images = {"image": normal(0, 2, *image_shape), "label": jnp.array([0, 1])}
    new, metrics = jax.jit(steps.train)(state, images)
    chex.assert_tree_all_finite((new, metrics))
    assert int(new.step) == 1
    assert jnp.any(new.params["head"]["kernel"] != state.params["head"]["kernel"])
    for before, after in zip(
        jax.tree.leaves(state.batch_stats), jax.tree.leaves(new.batch_stats), strict=True
    ):
        assert jnp.any(before != after)
