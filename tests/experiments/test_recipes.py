import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments._config import DataConfig, recipe_from_dict
from experiments._models import make_model, make_transform
from experiments._recipes import get_recipe, recipe_names
from experiments._run import Run
from wsbcn_flax.data import dataset_names


def test_names_are_unique_and_resolve():
    names = recipe_names()
    assert len(set(names)) == len(names)
    for name in names:
        recipe = get_recipe(name)
        weight = recipe.weight.kind
        parts = (recipe.model.name, recipe.norm.kind, *(() if weight == "none" else (weight,)))
        assert name.endswith("_" + "_".join(parts))
        assert recipe.data.name in (*dataset_names(), "imagenet")
        assert recipe.data.name.startswith(name.split("_")[0])
        hash(recipe)


@pytest.mark.parametrize("name", ["digits_resnet8_bn", "imagenet_resnext101_32x4d_bcn_ws"])
def test_a_recipe_comes_back_from_json(name):
    recipe = get_recipe(name)
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert recipe_from_dict(values) == recipe


@pytest.mark.parametrize(
    "change", [lambda v: v.pop("data"), lambda v: v["norm"].update(power=2), lambda v: v.clear()]
)
def test_values_of_another_version_are_refused(change):
    values = dataclasses.asdict(get_recipe("digits_resnet8_bn"))
    change(values)
    with pytest.raises(ValueError, match="another version"):
        recipe_from_dict(values)


@pytest.mark.parametrize("name", ["digits_resnet8_bcnws", "digits_resnet8", "", "imagenet"])
def test_unknown_name_lists_what_there_is(name):
    with pytest.raises(ValueError, match=r"norms: bn, gn, ln, in, bcn; .*The nearest: "):
        get_recipe(name)


@pytest.mark.parametrize(
    "name", [n for n in recipe_names() if n.startswith("mnist5k_resnet8")], ids=str
)
def test_every_normalization_and_weight_makes_a_model(name):
    recipe = get_recipe(name)
    model, transform = make_model(recipe, num_classes=10), make_transform(recipe.weight)
    images = jnp.ones((2, 8, 8, 1))

    def run(key):
        variables = dict(model.init(key, images, train=False))
        if transform is not None:
            gained = transform.with_gains(variables["params"])
            variables["params"] = transform(gained)
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    logits = jax.eval_shape(run, jax.random.key(0))
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"size": 64, "micro": 3, "devices": 1}, "whole number of micro-batches"),
        ({"size": 12, "devices": 8}, "whole number of micro-batches"),
        ({"size": 64, "devices": 9}, "from 1 to the 8 devices"),
        ({"size": 100_000}, "must not exceed the training set"),
    ],
)
def test_refuses_a_batch_that_does_not_divide(batch, message, tmp_path):
    recipe = get_recipe("digits_resnet8_bcn_ws")
    recipe = dataclasses.replace(
        recipe,
        data=DataConfig(name="digits", data_dir=str(tmp_path)),
        batch=dataclasses.replace(recipe.batch, **batch),
    )
    with pytest.raises(ValueError, match=message):
        Run.build(recipe)


def test_refuses_no_epochs():
    with pytest.raises(ValueError, match="epochs must be positive"):
        dataclasses.replace(get_recipe("digits_resnet8_bn"), epochs=0)


def test_refuses_options_of_other_networks():
    recipe = get_recipe("cifar10_vgg16_bn")
    model = dataclasses.replace(recipe.model, width=8)
    with pytest.raises(ValueError, match="for CIFAR residual networks, received width for vgg16"):
        make_model(dataclasses.replace(recipe, model=model), num_classes=10)


def test_refuses_an_unknown_network():
    recipe = get_recipe("cifar10_vgg16_bn")
    model = dataclasses.replace(recipe.model, name="resnet9")
    with pytest.raises(ValueError, match=r"one of resnet8, .* received 'resnet9'"):
        make_model(dataclasses.replace(recipe, model=model), num_classes=10)
