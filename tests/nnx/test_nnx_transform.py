"""The parameter transform takes an NNX state in the same way as Linen's parameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from oracles import normal

from wsbcn_flax import WeightStandardization
from wsbcn_flax.nnx import BatchChannelNorm, WSConv, to_variables
from wsbcn_flax.training import kernel_mask
from wsbcn_flax.transforms import fold_weight_standardization

X = normal(1, 2, 6, 6, 3)


class Net(nnx.Module):
    """Convolutions in a list, each with a normalization, and a head."""

    def __init__(self, conv, rngs):
        norm = functools.partial(BatchChannelNorm, num_groups=2, rngs=rngs)
        self.layers = nnx.List([])
        for before in (3, 4):
            self.layers.append(conv(before, 4, (3, 3), use_bias=False, rngs=rngs))
            self.layers.append(norm(4))
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


def parts(conv=nnx.Conv):
    return nnx.split(Net(conv, nnx.Rngs(0)), nnx.Param, ...)


def test_takes_the_kernels_that_it_takes_of_dictionaries():
    ws, (_, params, _) = WeightStandardization(), parts()
    assert ws.paths(params) == ["layers/0/kernel", "layers/2/kernel"]
    of_state = nnx.to_pure_dict(ws(params))
    chex.assert_trees_all_equal(of_state, ws(nnx.to_pure_dict(params)))
    chex.assert_trees_all_equal_structs(ws(params), params)


@pytest.mark.parametrize("preset", ["bcn", "nfnet"])
def test_a_plain_model_on_its_result_is_the_model_of_ws_layers(preset):
    """They agree in evaluation with folded kernels, and in gradients of the raw parameters."""
    ws = WeightStandardization(preset=preset)
    graphdef, params, rest = parts()
    ws_graphdef, ws_params, ws_rest = parts(functools.partial(WSConv, preset=preset))
    chex.assert_trees_all_equal(ws.with_gains(params), ws_params)
    folded = fold_weight_standardization(ws_params, preset=preset)
    chex.assert_trees_all_equal_structs(folded, params)

    def plain(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, ws(params), rest, copy=True)(X)))

    def standardized(params):
        return jnp.sum(jnp.sin(nnx.merge(ws_graphdef, params, ws_rest, copy=True)(X)))

    one, other = (jax.jit(jax.value_and_grad(f))(ws_params) for f in (plain, standardized))
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-6)


def test_weight_decay_takes_kernels_alone():
    _, params, _ = parts()
    decay = optax.add_decayed_weights(1.0, mask=kernel_mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    moved = {path[-1] for path, u in nnx.to_flat_state(updates) if jnp.any(u.get_value() != 0)}
    assert moved == {"kernel"}


def test_a_model_is_no_state():
    with pytest.raises(TypeError, match=r"nnx.state\(model, nnx.Param\).*received Net"):
        WeightStandardization()(Net(nnx.Conv, nnx.Rngs(0)))
    assert set(to_variables(Net(nnx.Conv, nnx.Rngs(0)))["params"]["layers"]) == set("0123")
