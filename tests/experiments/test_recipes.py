"""Recipes: their names, published results, and steps that trace and run on matching data."""

import dataclasses
import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from oracles import normal

from experiments import _models, recipes
from experiments._detection import COCO_FACTS
from experiments._image_data import PUBLISHED_FACTS
from experiments._models import make_model
from experiments._recipe import DataConfig
from experiments.recipes import get_recipe, recipe_from_dict, recipe_names, recipe_to_dict
from wsbcn_flax import models
from wsbcn_flax.data import dataset_names

IMAGENET = ("resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d")
CIFAR = ("resnet110", "preresnet110", "resnext29_8x64d", "wrn28_10")
ROWS = (
    *(f"imagenet_{model}_gn_ws" for model in IMAGENET),
    *(f"{data}_{model}_bn" for data in ("cifar10", "cifar100") for model in CIFAR),
)
# One recipe for every family of networks, and a small member of that family.
SMALL = {
    "imagenet_resnet18_bcn_ws": functools.partial(
        models.ResNet, stage_sizes=(1, 1), features=64, block=models.BasicBlock
    ),
    "imagenet_resnext50_32x4d_gn_ws": functools.partial(models.ResNeXt50_32x4d, stage_sizes=(1,)),
    "cifar10_resnet20_bcn_ws": functools.partial(models.CifarResNet, depth=8),
    "cifar100_preresnet110_bn": functools.partial(models.PreResNet110, depth=8),
    "cifar10_resnext29_8x64d_bcn_ws": functools.partial(models.ResNeXt29_8x64d, depth=11, width=16),
    "cifar10_wrn28_10_bcn_ws": functools.partial(models.WRN28_10, depth=8, features=32),
    "cifar10_vgg16_gn_ws": functools.partial(
        models.VGG, stage_sizes=(1, 1), stage_features=(32, 64)
    ),
    "cifar100_densenet100_12_gn_ws": functools.partial(models.DenseNetBC100_12, depth=16),
}


def some_values(shape):
    """Makes an array of a state: positive, like variances, and about as large as kernels."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return 0.1 * jnp.abs(normal(1, *shape.shape, dtype=shape.dtype))
    return jnp.zeros(shape.shape, shape.dtype)


def test_names_are_unique_and_resolve():
    names = recipe_names()
    assert len(set(names)) == len(names)
    for name in names:
        recipe = get_recipe(name)
        weight = recipe.weight.kind
        parts = (recipe.model.name, recipe.norm.kind, *(() if weight == "none" else (weight,)))
        assert name == "_".join((recipe.data.name, *parts))
    data = {get_recipe(name).data.name for name in names}
    assert data - set(COCO_FACTS) == set(dataset_names()) == set(PUBLISHED_FACTS)


def test_every_published_row_has_a_recipe():
    assert {name for name in recipes.PUBLISHED if not name.startswith("coco")} == set(ROWS)
    for name in ROWS:
        text = recipes.describe(name)
        assert re.search(r"Expected result: \d+\.\d+ %.* \(.*README", text)
        recipe = get_recipe(name)
        steps = round(
            recipe.epochs * (PUBLISHED_FACTS[recipe.data.name].train_size // recipe.batch.size)
        )
        assert text.startswith(f"{steps:,} steps of {recipe.batch.size} images. FLOPs")
        with_bcn = recipes.describe(re.sub("_(gn_ws|bn)$", "_bcn_ws", name))
        assert f"no verified number; {name}: " in with_bcn
    assert recipes.describe("digits_resnet8_bn") == "176 steps of 64 images."


@pytest.mark.parametrize("name", [*ROWS[:8], "imagenet_resnet50_bcn_ws"])
def test_a_published_recipe_traces(name):
    """This traces the training step at the recipe's own size; small networks run below."""
    experiment = get_recipe(name).experiment()
    state = jax.eval_shape(lambda: experiment.init(0))
    batch = {
        name: jax.ShapeDtypeStruct((experiment.batch.size, *x.shape), x.dtype)
        for name, x in experiment.data.element_spec.items()
    }
    train = experiment.compile(jax.devices()[:1]).train
    new_state, metrics = train.eval_shape(state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert set(metrics) == {"loss", "error", "grad_norm"}


@pytest.mark.parametrize("name", SMALL)
def test_takes_a_real_step(name, monkeypatch):
    """A small network of the family takes one step on two images."""
    recipe = get_recipe(name)
    monkeypatch.setitem(_models.MODELS, recipe.model.name, SMALL[name])
    batch = dataclasses.replace(recipe.batch, size=2)
    data = dataclasses.replace(recipe.data, image_size=32)
    experiment = dataclasses.replace(recipe, batch=batch, data=data).experiment()
    # Any values are fine, and compiling the initialization would take as long as the step.
    state = jax.tree.map(some_values, jax.eval_shape(lambda: experiment.init(0)))
    images = {"image": normal(0, 2, 32, 32, 3), "label": jnp.array([0, 1])}
    program = experiment.compile(jax.devices()[:1])
    new, metrics = program.train(program.partition.place_state(state), images)
    chex.assert_tree_all_finite((new, metrics))
    assert int(new.step) == 1
    assert jnp.any(new.params["head"]["kernel"] != state.params["head"]["kernel"])
    for before, after in zip(
        jax.tree.leaves(state.batch_stats), jax.tree.leaves(new.batch_stats), strict=True
    ):
        assert jnp.any(before != after)


@pytest.mark.parametrize("name", ["digits_resnet8_bn", "imagenet_resnext101_32x4d_bcn_ws"])
def test_a_recipe_comes_back_from_json(name):
    values = json.loads(json.dumps(recipe_to_dict(get_recipe(name))))
    assert recipe_from_dict(values) == get_recipe(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("data"),
        lambda v: v["norm"].update(power=2),
        lambda v: v.update(task="divination"),
        lambda v: v.clear(),
    ],
)
def test_values_of_another_version_are_refused(change):
    values = recipe_to_dict(get_recipe("digits_resnet8_bn"))
    change(values)
    with pytest.raises(ValueError, match="another version"):
        recipe_from_dict(values)


@pytest.mark.parametrize(
    "name", ["digits_resnet8_bcnws", "digits_resnet8", "digits_vgg16_bn", "", "imagenet"]
)
def test_an_unknown_name_is_told_the_nearest(name):
    with pytest.raises(ValueError, match=r"Did you mean .*train --help"):
        get_recipe(name)


@pytest.mark.parametrize(
    "name", [n for n in recipe_names() if n.startswith("mnist5k_resnet8")], ids=str
)
def test_every_normalization_and_weight_makes_a_step(name):
    experiment = get_recipe(name).experiment()
    state = jax.eval_shape(lambda: experiment.init(0))
    spec = experiment.data.element_spec
    batch = {k: jax.ShapeDtypeStruct((64, *x.shape), x.dtype) for k, x in spec.items()}
    new_state, _ = experiment.compile(jax.devices()[:1]).train.eval_shape(state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"size": 64, "micro": 3, "devices": 1}, "whole number of micro-batches"),
        ({"size": 12, "devices": 8}, "whole number of micro-batches"),
        ({"size": 64, "devices": 9}, "from 1 to the 8 devices"),
    ],
)
def test_refuses_a_batch_that_does_not_divide(batch, message):
    recipe = get_recipe("digits_resnet8_bcn_ws")
    recipe = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch, **batch))
    with pytest.raises(ValueError, match=message):
        recipe.experiment().compile()


def test_refuses_a_batch_beyond_the_data(tmp_path):
    recipe = dataclasses.replace(
        get_recipe("digits_resnet8_bcn_ws"), data=DataConfig(name="digits", data_dir=str(tmp_path))
    )
    recipe = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch, size=100_000))
    with pytest.raises(ValueError, match="must not exceed the training set"):
        recipe.load_data()


def test_refuses_no_epochs():
    with pytest.raises(ValueError, match="epochs must be positive"):
        dataclasses.replace(get_recipe("digits_resnet8_bn"), epochs=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 8}, "for CIFAR residual networks, received width for vgg16"),
        ({"name": "resnet9"}, r"one of resnet8, .* received 'resnet9'"),
        ({"remat": True}, "residual blocks, received vgg16"),
    ],
    ids=str,
)
def test_refuses_options_of_other_networks(changes, message):
    recipe = get_recipe("cifar10_vgg16_bn")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **changes))
    with pytest.raises(ValueError, match=message):
        make_model(recipe, num_classes=10)
