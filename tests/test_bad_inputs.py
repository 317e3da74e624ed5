"""Every likely mistake raises the right exception, with the rule and the received values."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from wsbcn_flax import (
    BatchChannelNorm,
    WeightStandardization,
    WSConv,
    WSConvTranspose,
    WSDense,
    batch_channel_norm,
    standardize,
)
from wsbcn_flax.models import VGG, Bottleneck, CifarResNet, DenseNet, ResNet18, ResNet50, summarize
from wsbcn_flax.ops import RunningStats, StandardizationRule, channel_moments, channel_norm
from wsbcn_flax.training import (
    MicroBatches,
    Partition,
    TrainState,
    make_train_step,
    split_batch,
)

KEY = jax.random.key(0)
X = jnp.ones((2, 4, 4, 6))
IMAGES = jnp.ones((2, 8, 8, 3))
KERNEL = jnp.ones((3, 3, 4, 8))
PARAMS = {"conv": {"kernel": KERNEL}, "head": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)}}


class Case(NamedTuple):
    run: Callable
    message: str
    error: type[Exception] = ValueError


def bcn(x=X, features=6, **options):
    return batch_channel_norm(x, RunningStats.fresh(features), **{"num_groups": 2, **options})


def layer(x=X, **options):
    options = {"num_groups": 2, "use_running_average": False, **options}
    return BatchChannelNorm(**options).init(KEY, x)


def apply(*collections, **options):
    norm = BatchChannelNorm(num_groups=2, use_running_average=False)
    variables = norm.init(KEY, X)
    return norm.apply({name: variables[name] for name in collections}, X, **options)


def apply_without_count(use_running_average, **options):
    norm = BatchChannelNorm(num_groups=2)
    variables = norm.init(KEY, X, use_running_average=True)
    stats = {name: variables["batch_stats"][name] for name in ("mean", "var")}
    variables = {**variables, "batch_stats": stats}
    return norm.apply(variables, X, use_running_average=use_running_average, **options)


def resnet(depth=8, images=IMAGES, **options):
    return CifarResNet(depth=depth, **options).init(KEY, images, train=False)


CASES = {
    # Weight standardization.
    "unknown preset": Case(lambda: standardize(KERNEL, preset="wsn"), r"one of .*'bcn'.*'wsn'"),
    "preset of another type": Case(
        lambda: standardize(KERNEL, preset=1e-5), r"received float", TypeError
    ),
    "integer kernel": Case(
        lambda: standardize(KERNEL.astype(jnp.int32)), r"floating-point kernel.*int32", TypeError
    ),
    "out_axis": Case(lambda: standardize(KERNEL, out_axis=4), r"out_axis .*4 for \(3, 3, 4, 8\)"),
    "negative out_axis": Case(lambda: standardize(KERNEL, out_axis=-5), r"out_axis .*-5"),
    "fan-in of one": Case(
        lambda: standardize(jnp.ones((1, 1, 1, 8))), r"fan-in of at least 2, received 1.*depthwise"
    ),
    "gain per input channel": Case(
        lambda: standardize(KERNEL, gain=jnp.ones(4)), r"gain .*\(8,\).*\(4,\)"
    ),
    "unknown denominator": Case(
        lambda: StandardizationRule(denominator="var", epsilon=1e-5), r"one of .*'norm'.*'var'"
    ),
    "epsilon of a rule": Case(
        lambda: StandardizationRule(denominator="norm", epsilon=0.0), r"positive.*received 0.0"
    ),
    "layer's preset": Case(lambda: WSConv(8, (3, 3), preset="wsn").init(KEY, X), r"preset .*'wsn'"),
    "1x1 depthwise layer": Case(
        lambda: WSConv(6, (1, 1), feature_group_count=6).init(KEY, X), r"fan-in of at least 2"
    ),
    "integer images to WSConv": Case(
        lambda: WSConv(8, (3, 3)).init(KEY, IMAGES.astype(jnp.uint8)),
        r"WSConv needs floating-point.*uint8.*/ 255",
        TypeError,
    ),
    "integer images to WSConvTranspose": Case(
        lambda: WSConvTranspose(8, (3, 3)).init(KEY, IMAGES.astype(jnp.int32)),
        r"WSConvTranspose needs floating-point.*int32",
        TypeError,
    ),
    "booleans to WSDense": Case(
        lambda: WSDense(8).init(KEY, X > 0), r"WSDense needs floating-point.*bool", TypeError
    ),
    # The transform.
    "transform's preset": Case(lambda: WeightStandardization(preset="wsn"), r"preset .*'wsn'"),
    "default rule without convolutions": Case(
        lambda: WeightStandardization()({"head": PARAMS["head"]}),
        r"default rule matched none of \[head/kernel\]",
    ),
    "predicate that matches nothing": Case(
        lambda: WeightStandardization(where=lambda path, array: False)(PARAMS),
        r"at least one kernel.*matched none of \[conv/kernel, head/kernel\]",
    ),
    "pattern that matches nothing": Case(
        lambda: WeightStandardization(where="stem/*")(PARAMS), r"\['stem/\*'\] matched none"
    ),
    "one pattern of two": Case(
        lambda: WeightStandardization(where=["conv", "stem"]).paths(PARAMS), r"\['stem'\]"
    ),
    "empty parameters": Case(lambda: WeightStandardization()({}), r"no kernels at all"),
    "transform's kernel": Case(
        lambda: WeightStandardization(where="conv", out_axis=4)(PARAMS), r"conv/kernel: out_axis"
    ),
    # Normalizations.
    "groups": Case(lambda: bcn(num_groups=4), r"num_groups=4 for 6 channels.*\[1, 2, 3, 6\]"),
    "no groups": Case(lambda: bcn(num_groups=0), r"num_groups=0"),
    "groups of None": Case(
        lambda: layer(num_groups=None), r"whole number, received None.*num_groups=C", TypeError
    ),
    "groups of a float": Case(
        lambda: bcn(num_groups=2.0), r"whole number, received 2.0", TypeError
    ),
    "groups of one value": Case(
        lambda: bcn(X[:, :1, :1], num_groups=6), r"more than one value.*\(2, 1, 1, 6\).*the\s+bias"
    ),
    "negative groups": Case(lambda: channel_norm(X, num_groups=-2), r"num_groups=-2"),
    "layer's groups": Case(lambda: layer(num_groups=32), r"BatchChannelNorm .*num_groups=32"),
    "rank": Case(lambda: bcn(jnp.ones(6)), r"rank 1 .*\(6,\).*x\[None\]"),
    "layer's rank": Case(lambda: layer(jnp.ones(6)), r"BatchChannelNorm .*rank 1"),
    "integers": Case(lambda: bcn(X.astype(jnp.uint8)), r"uint8.*astype", TypeError),
    "integers to the layer": Case(
        lambda: layer(X.astype(jnp.int32)), r"BatchChannelNorm .*int32", TypeError
    ),
    "complex": Case(lambda: channel_moments(X + 1j), r"complex64", TypeError),
    "empty batch": Case(lambda: bcn(X[:0]), r"received shape \(0, 4, 4, 6\).*empty batches"),
    "empty image": Case(lambda: layer(X[:, :0]), r"received shape \(2, 0, 4, 6\)"),
    "statistics": Case(lambda: bcn(statistics="running"), r"'batch', 'estimate'.*'running'"),
    "order": Case(lambda: bcn(order="last"), r"'update_first', 'normalize_first'.*'last'"),
    "layer's statistics": Case(lambda: BatchChannelNorm(statistics="x"), r"statistics .*'x'"),
    "layer's order": Case(lambda: BatchChannelNorm(order="x"), r"order .*'x'"),
    "affine": Case(lambda: BatchChannelNorm(affine="none"), r"'group', 'channel'.*'none'"),
    "rate above one": Case(lambda: bcn(rate=1.5), r"from 0 to 1, received 1.5"),
    "negative rate": Case(lambda: BatchChannelNorm(rate=-0.1), r"received -0.1.*momentum"),
    "rate of a schedule": Case(
        lambda: BatchChannelNorm(rate=lambda count: 2.0), r"schedule, at count 0.*received 2.0"
    ),
    "rate of a schedule, later": Case(
        lambda: bcn(rate=lambda count: count / 10), r"schedule, at count 1000.*received 100"
    ),
    "NaN of a schedule": Case(lambda: bcn(rate=lambda count: jnp.nan), r"received nan"),
    "list of a schedule": Case(
        lambda: bcn(rate=lambda count: [0.1]), r"one number.*received \[0.1\]", TypeError
    ),
    "None of a schedule": Case(
        lambda: bcn(rate=lambda count: None), r"one number.*received None", TypeError
    ),
    "array of a schedule": Case(
        lambda: bcn(rate=lambda count: count + jnp.zeros(2)), r"one number", TypeError
    ),
    "rate of another type": Case(
        lambda: BatchChannelNorm(rate="0.1"), r"rate must be one number.*'0.1'", TypeError
    ),
    "epsilon": Case(lambda: bcn(epsilon=0.0), r"epsilon must be positive, received 0.0"),
    "layer's epsilon": Case(lambda: BatchChannelNorm(epsilon=-1e-5), r"epsilon .*-1e-05"),
    "mask without channel axis": Case(
        lambda: bcn(mask=jnp.ones((2, 4, 4))), r"mask \(2, 4, 4\) for x \(2, 4, 4, 6\)"
    ),
    "mask per channel": Case(lambda: bcn(mask=jnp.ones(X.shape)), r"channel axis of 1"),
    "mask of another size": Case(
        lambda: channel_norm(X, num_groups=2, mask=jnp.ones((2, 3, 4, 1))), r"mask \(2, 3, 4, 1\)"
    ),
    "channel_scale": Case(
        lambda: bcn(channel_scale=jnp.ones(3)), r"scale .*\(2,\).*\(6,\).*received shape \(3,\)"
    ),
    "channel_bias": Case(lambda: bcn(channel_bias=jnp.ones(4)), r"bias .*received shape \(4,\)"),
    "batch_scale": Case(
        lambda: bcn(batch_scale=jnp.ones(2)), r"batch_scale of shape \(6,\).*\(2,\)"
    ),
    "batch_bias": Case(lambda: bcn(batch_bias=jnp.ones(())), r"batch_bias of shape \(6,\).*\(\)"),
    "running statistics": Case(lambda: bcn(features=8), r"mean of shape \(6,\).*received \(8,\)"),
    "no mutable": Case(
        lambda: apply("params", "batch_stats"), r'immutable.*mutable=\["batch_stats"\]'
    ),
    "no batch_stats": Case(
        lambda: apply("params", mutable=["batch_stats"]), r"received no batch_stats"
    ),
    "statistics of nn.BatchNorm in evaluation": Case(
        lambda: apply_without_count(True), r"received no count.*add jnp.zeros"
    ),
    "statistics of nn.BatchNorm in training": Case(
        lambda: apply_without_count(False, mutable=["batch_stats"]), r"received no count"
    ),
    "one value of each channel": Case(
        lambda: bcn(X[:1, :1, :1], statistics="batch"),
        r"more than one value of each channel.*\(1, 1, 1, 6\)",
        UserWarning,
    ),
    "no mode": Case(lambda: layer(use_running_average=None), r"use_running_average"),
    # Models.
    "depth": Case(lambda: CifarResNet(depth=18), r"6n \+ 2.*received 18"),
    "depth of no blocks": Case(lambda: CifarResNet(depth=2), r"6n \+ 2.*received 2"),
    "depth with bottlenecks": Case(
        lambda: CifarResNet(depth=14, width=64, block=Bottleneck), r"9n \+ 2 \(11, 20, 29.* 14"
    ),
    "depth of a DenseNet": Case(
        lambda: DenseNet(depth=99, growth=12), r"6n \+ 4 .*100.*received 99"
    ),
    "growth": Case(lambda: DenseNet(depth=100, growth=0), r"at least 1, received 0"),
    "dropout rate": Case(lambda: resnet(dropout_rate=1.0), r"\[0, 1\), received 1.0"),
    "features of a bottleneck": Case(
        lambda: ResNet50(features=30).init(jax.random.key(0), X[:, :8, :8], train=False),
        r"whole number.*features=30, base_width=64.*divisible by 4",
    ),
    "stage without blocks": Case(
        lambda: ResNet18(stage_sizes=(2, 0)), r"at least one block.*\(2, 0\)"
    ),
    "stages without channels": Case(
        lambda: VGG(stage_sizes=(1, 1, 1), stage_features=(8, 8)), r"\(1, 1, 1\).*\(8, 8\)"
    ),
    "images too small": Case(
        lambda: VGG(stage_sizes=(1,) * 5).init(KEY, IMAGES, train=False),
        r"5 times.*at least 32x32.*\(2, 8, 8, 3\)",
    ),
    "integer images to a model": Case(
        lambda: resnet(images=IMAGES.astype(jnp.uint8)), r"uint8.*/ 255", TypeError
    ),
    "one image": Case(lambda: resnet(images=IMAGES[0]), r"\(8, 8, 3\).*images\[None\]"),
    "no images": Case(lambda: resnet(images=IMAGES[:0]), r"non-empty.*\(0, 8, 8, 3\)"),
    "image shape to summarize": Case(
        lambda: summarize(CifarResNet(depth=8), (1, 32, 32, 3)), r"\(H, W, C\).*\(1, 32, 32, 3\)"
    ),
    # Training.
    "a layer for a maker": Case(
        lambda: resnet(norm=BatchChannelNorm(num_groups=2)), r"makes layers.*a layer", TypeError
    ),
    "a name for a maker": Case(
        lambda: resnet(conv="ws"), r"conv must .*received str 'ws'", TypeError
    ),
    "variables to standardize": Case(
        lambda: WeightStandardization(where="conv")({"params": PARAMS}), r"pass variables\["
    ),
    "parameters for variables": Case(
        lambda: TrainState.create(PARAMS, optax.sgd(0.1)), r"a collection \"params\".*'head'"
    ),
    "a model for a task": Case(
        lambda: make_train_step(CifarResNet(depth=8), optax.sgd(0.1)),
        r"received a model.*Classification\(model=CifarResNet",
        TypeError,
    ),
    "no micro-batches": Case(lambda: MicroBatches(count=0), r"at least 1.*received 0"),
    "loop": Case(lambda: MicroBatches(loop="while"), r"'scan'.*'while'"),
    "batch_stats rule": Case(lambda: MicroBatches(batch_stats="sum"), r"'average'.*'sum'"),
    "vmap that carries": Case(
        lambda: MicroBatches(count=2, loop="vmap", batch_stats="carry"), r"vmap.*carry.*scan"
    ),
    "indivisible micro-batches": Case(
        lambda: split_batch({"image": jnp.ones((6, 2))}, 4), r"4 micro-batches.* 6.*\[1, 2, 3, 6\]"
    ),
    "arrays of unequal lengths": Case(
        lambda: split_batch({"image": jnp.ones((4, 2)), "label": jnp.ones(3)}, 1),
        r"common.*image.*\(4, 2\).*label.*\(3,\)",
    ),
    "scalar in a batch": Case(lambda: split_batch({"x": jnp.ones(())}, 1), r"leading batch axis"),
    "empty batch to split": Case(lambda: split_batch({"x": jnp.ones((0, 2))}, 1), r"non-empty"),
    "empty mapping to split": Case(lambda: split_batch({}, 1), r"non-empty"),
    "mode": Case(lambda: Partition(mode="xmap"), r"'shard_map'.*'xmap'"),
    "indivisible devices": Case(
        lambda: Partition().place_batch({"x": jnp.ones((12, 2))}), r"12 for 8 devices"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_raises(case):
    with pytest.raises(case.error, match=f"(?s){case.message}") as caught:
        case.run()
    assert type(caught.value) is case.error
