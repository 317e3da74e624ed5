"""Weight Standardization that starts from a checkpoint trained without it (mmcv's ConvAWS)."""

import functools
import re
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import normal, tree_relative_error

import wsbcn_flax.nnx
from wsbcn_flax import WeightStandardization, WSConv
from wsbcn_flax.nnx import load_variables
from wsbcn_flax.training import OptimizerConfig
from wsbcn_flax.transforms import import_checkpoint

X = normal(1, 2, 6, 6, 3)
AWS = WeightStandardization(preset="aws")


class Net(nn.Module):
    conv: object = nn.Conv

    @nn.compact
    def __call__(self, x):
        x = self.conv(4, (3, 3), use_bias=False, name="conv")(x)
        return nn.Dense(2, name="head")(nn.GroupNorm(2, name="norm")(x).mean((1, 2)))


@functools.cache
def plain():
    """Makes parameters whose kernels have different means and spreads in each channel."""
    params = Net().init(jax.random.key(0), X)["params"]
    kernel = params["conv"]["kernel"] * jnp.arange(1, 5.0) + jnp.arange(4.0)
    return {**params, "conv": {"kernel": kernel}}


@pytest.fixture(autouse=True)
def _ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_the_model_computes_what_it_did():
    """The transform and the layers keep the outputs; other presets change them."""
    expected = Net().apply({"params": plain()}, X)
    params = AWS.start_from_plain(plain())
    aws = Net(functools.partial(WSConv, preset="aws"))
    assert jax.tree.structure(aws.init(jax.random.key(0), X)["params"]) == jax.tree.structure(
        params
    )
    for y in (Net().apply({"params": AWS(params)}, X), aws.apply({"params": params}, X)):
        assert tree_relative_error(y, expected) < 1e-5
    other = WeightStandardization(preset="official")(plain())
    assert tree_relative_error(Net().apply({"params": other}, X), expected) > 1e-2


def test_the_constants_are_those_of_mmcv():
    """They are the unbiased standard deviation with epsilon, and the mean, per output channel."""
    flat = np.asarray(plain()["conv"]["kernel"]).reshape(-1, 4).astype(np.float64)
    conv = AWS.start_from_plain(plain())["conv"]
    expected = np.sqrt(flat.var(0, ddof=1) + 1e-5)
    np.testing.assert_allclose(conv["constant_gain"], expected, rtol=1e-5)
    np.testing.assert_allclose(conv["constant_shift"], flat.mean(0), rtol=1e-5)
    fresh = AWS.with_gains(plain())["conv"]
    chex.assert_trees_all_equal(fresh["constant_gain"], jnp.ones(4))
    chex.assert_trees_all_equal(fresh["constant_shift"], jnp.zeros(4))


def test_stacked_layers_have_constants_each():
    kernels = jnp.stack([plain()["conv"]["kernel"], 2 * plain()["conv"]["kernel"]])
    params = {"conv": {"kernel": kernels}, "norm": {"scale": jnp.ones((2, 4))}}
    ws = WeightStandardization(preset="aws", stacked_axes=1)
    started = ws.start_from_plain(params)
    assert started["conv"]["constant_gain"].shape == (2, 4)
    assert tree_relative_error(ws(started), params) < 1e-5


def test_training_keeps_the_constants():
    """No gradient and no weight decay moves them, even with ``decays_everything``."""
    params = AWS.start_from_plain(plain())
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(Net().apply({"params": AWS(p)}, X))))(params)
    config = OptimizerConfig(decays_everything=True, weight_decay=0.1)
    optimizer = config.make(optax.constant_schedule(0.1))
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moved["conv"] == {"kernel": True, "constant_gain": False, "constant_shift": False}
    assert moved["norm"]["scale"]


def test_an_nnx_layer_and_state_start_alike():
    params = AWS.start_from_plain(plain())
    conv = wsbcn_flax.nnx.WSConv(3, 4, (3, 3), use_bias=False, preset="aws", rngs=nnx.Rngs(0))
    load_variables(conv, {"params": params["conv"]})
    expected = nn.Conv(4, (3, 3), use_bias=False).apply({"params": plain()["conv"]}, X)
    assert tree_relative_error(conv(X), expected) < 1e-5
    rule = WeightStandardization(preset="aws", where="kernel")
    kernel = nnx.State({"kernel": nnx.Param(plain()["conv"]["kernel"])})
    started = rule.start_from_plain(kernel)
    chex.assert_trees_all_equal(nnx.to_pure_dict(started), params["conv"])


def test_other_presets_cannot_start_so():
    with pytest.raises(ValueError, match=r"preset with constants.*'bcn'"):
        WeightStandardization().start_from_plain(plain())


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("resnet50", "official", "trained without Weight Standardization.*start_from_plain"),
        ("R-50-GN-WS", "bcn", 'trained with preset="official"'),
        ("resnet50", "aws", None),
        ("R-50-GN-WS", "official", None),
        ("resnet50", None, None),
    ],
)
def test_the_importer_warns_where_the_function_changes(name, preset, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(AttributeError):  # It warns before it reads arrays; here are none.
            import_checkpoint(None, name, preset=preset)
    assert len(caught) == (message is not None)
    assert message is None or re.search(message, str(caught[0].message))
