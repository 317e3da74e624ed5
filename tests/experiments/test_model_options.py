"""Options of a recipe's model, rematerialization and dtypes, take effect in the lowered step."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._models import MODELS, make_model
from experiments.recipes import get_recipe
from wsbcn_flax import models
from wsbcn_flax.training import BatchConfig

BATCH = {
    "image": np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32),
    "label": np.arange(16, dtype=np.int32) % 10,
}


def make_recipe(*, batch=None, **model):
    recipe = get_recipe("digits_resnet8_bcn_ws")
    model = dataclasses.replace(recipe.model, **{"width": 8, **model})
    return dataclasses.replace(recipe, model=model, batch=BatchConfig(size=16, **(batch or {})))


def one_step(recipe):
    program = recipe.experiment().compile(jax.devices()[:1])
    return jax.device_get(program.train(program.init(0), BATCH))


@pytest.fixture(scope="module")
def plain():
    return one_step(make_recipe())


def test_rematerialization_takes_the_same_step(plain):
    remat = one_step(make_recipe(remat=True))
    assert jax.tree.structure(plain) == jax.tree.structure(remat)
    for one, other in zip(*map(jax.tree.leaves, (plain, remat)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


SHALLOW = {
    "resnet8": functools.partial(models.CifarResNet, depth=8),
    "resnext29_8x64d": functools.partial(models.ResNeXt29_8x64d, depth=11),
    "wrn28_10": functools.partial(models.WRN28_10, depth=8, features=32),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_every_kind_of_block_is_rematerialized(name, monkeypatch):
    monkeypatch.setitem(MODELS, name, SHALLOW[name])

    def kept(remat):
        """Counts elements that are kept for the backward pass, besides the parameters."""
        model = make_model(make_recipe(name=name, width=None, remat=remat), num_classes=10)
        images = jnp.zeros((2, 32, 32, 3))
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))

        def pull_back(params, batch_stats):
            def forward(params):
                variables = {"params": params, "batch_stats": batch_stats}
                rngs = {"dropout": jax.random.key(0)}
                return model.apply(
                    variables, images, train=True, mutable=["batch_stats"], rngs=rngs
                )

            return jax.vjp(forward, params)[1]

        count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
        return count(jax.eval_shape(pull_back, **variables)) - count(variables["params"])

    assert kept(remat=True) < 0.5 * kept(remat=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_computation_keeps_wide_parameters_and_statistics(dtype, plain):
    _, wide = plain
    state, metrics = one_step(make_recipe(dtype=dtype))
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
    assert {leaf.dtype for leaf in leaves} <= {np.dtype("float32"), np.dtype("int32")}
    assert float(metrics["loss"]) == pytest.approx(float(wide["loss"]), rel=2e-2)
    assert float(metrics["grad_norm"]) == pytest.approx(float(wide["grad_norm"]), rel=0.1)
    assert ("loss_scale" in metrics) == (dtype == "float16")


@pytest.mark.parametrize(
    ("mode", "model", "batch"),
    [
        ("jit", {"dtype": "float16"}, {"shard_optimizer": True, "micro": 4, "loop": "scan"}),
        ("shard_map", {"dtype": "float16"}, {"micro": 1, "loop": "scan"}),
        ("shard_map", {"dtype": "bfloat16", "remat": True}, {}),
    ],
    ids=str,
)
def test_the_step_lowers_for_gpus(mode, model, batch):
    experiment = make_recipe(batch={"mode": mode, **batch}, **model).experiment()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
    export = jax.export.export(experiment.compile(jax.devices()).train, platforms=["cuda"])
    exported = export(jax.eval_shape(lambda: experiment.init(0)), shapes)
    assert exported.platforms == ("cuda",)
    assert exported.nr_devices == 8
    # The exported program holds the collectives of shard_map; those of jit are added by XLA.
    assert ("all_reduce" in exported.mlir_module()) == (mode == "shard_map")
