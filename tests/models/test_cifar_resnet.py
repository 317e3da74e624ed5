"""CifarResNet: size, initialization, and injected convolutions and normalizations."""

import functools

import chex
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from networks import NORMS, abstract_variables, count
from oracles import normal

from wsbcn_flax import WSConv
from wsbcn_flax.models import BasicBlock, CifarResNet, PreActBlock

X = normal(1, 2, 16, 16, 3)


@functools.cache
def init(model):
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), X)


def closed_form(depth, width, classes, *, preactivation):
    """Counts the convolutions, two numbers per normalized channel, and the head."""
    n, w = (depth - 2) // 6, width
    convolutions = 27 * w + 9 * w * w * (2 * n * (1 + 4 + 16) - 2 - 8)
    shortcuts = 2 * w * w + 8 * w * w
    channels = 2 * n * 7 * w
    # With preactivation a stage's first normalization has the width of its input; one more is last.
    channels += (-w - 2 * w + 4 * w) if preactivation else (w + 2 * w + 4 * w)
    return convolutions + shortcuts + 2 * channels + (4 * w + 1) * classes


@pytest.mark.parametrize("block", [BasicBlock, PreActBlock])
@pytest.mark.parametrize("depth", [8, 20])
@pytest.mark.parametrize("width", [16, 6])
def test_number_of_parameters(depth, width, block):
    model = CifarResNet(depth=depth, width=width, num_classes=7, block=block)
    expected = closed_form(depth, width, 7, preactivation=block is PreActBlock)
    assert count(abstract_variables(model)["params"]) == expected


@pytest.mark.parametrize(("depth", "expected"), [(20, 272_474), (110, 1_730_714)])
def test_number_of_parameters_is_the_published_one(depth, expected):
    """The published numbers are for projection shortcuts and 10 classes."""
    assert count(abstract_variables(CifarResNet(depth=depth))["params"]) == expected


def test_convolutions_start_he_normal_by_fan_out():
    params = init(CifarResNet(depth=8, width=64, norm=nn.LayerNorm))["params"]
    for path, kernel in traverse_util.flatten_dict(params, sep="/").items():
        if kernel.ndim != 4:
            continue
        std = np.sqrt(2 / (np.prod(kernel.shape[:2]) * kernel.shape[-1]))
        # The standard deviation of n samples has a relative error of 1 / sqrt(2 n).
        tolerance = 5 / np.sqrt(2 * kernel.size)
        np.testing.assert_allclose(jnp.std(kernel), std, rtol=tolerance, err_msg=path)
        if kernel.size > 1e4:
            assert jnp.abs(kernel).max() > 2.5 * std, "not truncated"


@pytest.mark.parametrize(
    ("norm", "block"),
    [*((norm, BasicBlock) for norm in NORMS), ("batch_norm", PreActBlock), ("bcn", PreActBlock)],
)
def test_injected_norms_are_told_the_mode(norm, block):
    """Train mode updates every norm's statistics; evaluation uses them, whatever the batch."""
    model = CifarResNet(depth=8, width=8, norm=NORMS[norm], block=block, conv=WSConv)
    variables = init(model)
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    logits, updates = train(variables, X)
    chex.assert_tree_all_finite(logits)
    chex.assert_shape(logits, (2, 10))
    evaluate = jax.jit(functools.partial(model.apply, train=False))
    trained = {**variables, **updates}
    whole = evaluate(trained, X)
    one = evaluate(trained, X[:1])
    chex.assert_trees_all_close(one, whole[:1], atol=1e-4)
    if norm in ("group_norm", "layer_norm"):
        assert not updates
        chex.assert_trees_all_close(logits, whole, atol=1e-5)
        return
    norms = {"/".join(p) for p in traverse_util.flatten_dict(updates["batch_stats"])}
    assert (
        len({path.rpartition("/")[0] for path in norms}) == {BasicBlock: 9, PreActBlock: 7}[block]
    )
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updates), strict=True
    ):
        assert (before != after).any()
    fresh = evaluate(variables, X)
    assert jnp.abs(logits - fresh).max() > 1e-3
    assert jnp.abs(whole - fresh).max() > 1e-3


def test_injected_convolution_is_everywhere_but_in_the_head():
    conv = functools.partial(WSConv, preset="nfnet")
    model = CifarResNet(depth=8, width=8, conv=conv, norm=nn.LayerNorm)
    params = abstract_variables(model)["params"]
    leaves = traverse_util.flatten_dict(params, sep="/")
    gains = {path.rpartition("/")[0] for path in leaves if path.endswith("/gain")}
    kernels = {path.rpartition("/")[0] for path in leaves if path.endswith("/kernel")}
    assert kernels - gains == {"head"}


@pytest.mark.parametrize("norm", ["batch_norm", "bcn"])
def test_bfloat16_computes_in_bfloat16_and_returns_float32(norm):
    wide = CifarResNet(depth=8, width=8, norm=NORMS[norm], conv=WSConv)
    half = wide.clone(dtype=jnp.bfloat16)
    variables = init(half)
    chex.assert_trees_all_equal(variables, init(wide))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}

    def run(model):
        apply = functools.partial(
            model.apply, train=True, mutable=["batch_stats"], capture_intermediates=True
        )
        logits, state = jax.jit(apply)(variables, X)
        kept = traverse_util.flatten_dict(state["intermediates"], sep="/")
        return logits, {path: leaf[0] for path, leaf in kept.items()}

    logits, intermediates = run(half)
    expected, _ = run(wide)
    assert logits.dtype == jnp.float32
    hidden = {leaf.dtype for path, leaf in intermediates.items() if path.startswith("stage")}
    assert hidden == {jnp.dtype(jnp.bfloat16)}
    assert 0 < jnp.abs(logits - expected).max() < 0.1 * jnp.abs(expected).max()


def test_dropout_needs_a_key_only_where_it_drops():
    never = CifarResNet(depth=8, width=8, norm=nn.LayerNorm, block=PreActBlock)
    often = never.clone(dropout_rate=0.5)
    variables = init(often)
    train = jax.jit(lambda key: often.apply(variables, X, train=True, rngs={"dropout": key}))
    jax.eval_shape(functools.partial(never.apply, train=True), variables, X)  # Needs no key.
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        often.apply(variables, X, train=True)
    one, again, other = (train(jax.random.key(seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, again)
    assert jnp.abs(one - other).max() > 1e-3
    chex.assert_trees_all_equal(
        *(jax.jit(functools.partial(m.apply, train=False))(variables, X) for m in (never, often))
    )


def test_stages_double_the_width_and_halve_the_resolution():
    model = CifarResNet(depth=14, width=4, norm=nn.LayerNorm)
    apply = functools.partial(model.init_with_output, train=False, capture_intermediates=True)
    # Only shapes are computed.
    _, state = jax.eval_shape(apply, jax.random.key(0), X)
    for stage, (resolution, width) in enumerate([(16, 4), (8, 8), (4, 16)], start=1):
        for index in (1, 2):
            (y,) = state["intermediates"][f"stage{stage}_block{index}"]["__call__"]
            assert y.shape == (2, resolution, resolution, width)
