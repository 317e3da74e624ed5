"""Every named network: its size, its standardized kernels, and every normalization in it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from networks import NETWORKS, abstract_variables, count, image_size

from wsbcn_flax import BatchChannelNorm, WeightStandardization, WSConv
from wsbcn_flax.models import CifarResNet

each_network = pytest.mark.parametrize("name", NETWORKS)
# Numbers of groups that divide every number of channels.
GROUPS = {"DenseNetBC100_12": 6}
BCN_OPTIONS = [
    {"affine": "group", "order": "update_first", "statistics": "estimate"},
    {"affine": "channel", "order": "normalize_first", "statistics": "estimate"},
    {"affine": "channel", "order": "normalize_first", "statistics": "batch"},
]
NORM_FACTORIES = {
    "bn": lambda groups: nn.BatchNorm,
    "gn": lambda groups: functools.partial(nn.GroupNorm, num_groups=groups),
    "ln": lambda groups: nn.LayerNorm,
    "in": lambda groups: nn.InstanceNorm,
    **{
        "-".join(("bcn", *options.values())): functools.partial(
            lambda groups, options: functools.partial(
                BatchChannelNorm, num_groups=groups, **options
            ),
            options=options,
        )
        for options in BCN_OPTIONS
    },
}
GROUP_BCN = "bcn-group-update_first-estimate"

# Counts include two numbers per normalized channel. For ImageNet they are those of torchvision and
# of the published checkpoints. For CIFAR they round to those of the papers and of the code base
# that the authors built on.
NUMBERS_OF_PARAMETERS = {
    "ResNet18": 11_689_512,
    "ResNet34": 21_797_672,
    "ResNet50": 25_557_032,
    "ResNet101": 44_549_160,
    "ResNet152": 60_192_808,
    "ResNeXt50_32x4d": 25_028_904,
    "ResNeXt101_32x4d": 44_177_704,
    "PreResNet110": 1_730_522,
    "PreResNet164": 1_703_258,
    "ResNeXt29_8x64d": 34_426_698,
    "WRN28_10": 36_479_194,
    "VGG16": 14_724_042,
    "VGG19": 20_035_018,
    "DenseNetBC100_12": 769_162,
}


@each_network
def test_number_of_parameters_and_what_is_standardized(name):
    """The default rule standardizes every convolution of the network and nothing else."""
    model = NETWORKS[name]()
    params = abstract_variables(model, image_size(model))["params"]
    assert count(params) == NUMBERS_OF_PARAMETERS[name]
    check_standardized(params)


def check_standardized(params):
    leaves = traverse_util.flatten_dict(params, sep="/")
    convolutions = [path for path, leaf in leaves.items() if leaf.ndim == 4]
    assert WeightStandardization().paths(params) == convolutions
    assert leaves["head/kernel"].ndim == 2


def three_stages(n, stem, features, branch, *, preactivation):
    """Counts the parameters for 10 classes, from the papers' tables.

    ``branch`` maps a block's input and output channels to its convolutions (size, input, output,
    groups).
    """
    total = 27 * stem + 2 * (4 * features if preactivation else stem) + (4 * features + 1) * 10
    channels = stem
    for out in (features, 2 * features, 4 * features):
        for _ in range(n):
            convolutions = branch(channels, out)
            total += sum(k * k * i * o // groups for k, i, o, groups in convolutions)
            total += 2 * sum(i if preactivation else o for _, i, o, _ in convolutions)
            if channels != out:
                total += channels * out + (0 if preactivation else 2 * out)
            channels = out
    return total


def basic(i, o):
    return [(3, i, o, 1), (3, o, o, 1)]


def bottleneck(i, o, *, inner=0.25, groups=1):
    width = int(o * inner)
    return [(1, i, width, 1), (3, width, width, groups), (1, width, o, 1)]


@pytest.mark.parametrize(
    ("name", "millions", "expected"),
    [
        ("PreResNet110", 1.73, three_stages(18, 16, 16, basic, preactivation=True)),
        ("PreResNet164", 1.70, three_stages(18, 16, 64, bottleneck, preactivation=True)),
        (
            "ResNeXt29_8x64d",
            34.43,
            three_stages(
                3, 64, 256, functools.partial(bottleneck, inner=2, groups=8), preactivation=False
            ),
        ),
        ("WRN28_10", 36.48, three_stages(4, 16, 160, basic, preactivation=True)),
        ("VGG19", 20.04, None),
        ("DenseNetBC100_12", 0.77, None),
    ],
)
def test_number_of_parameters_by_the_papers_tables(name, millions, expected):
    """The counts of the test above agree with the papers' tables."""
    parameters = NUMBERS_OF_PARAMETERS[name]
    assert round(parameters / 1e6, 2) == millions
    assert expected in (parameters, None)


def shallow(network):
    """Returns the network with as few blocks as possible and the same numbers of channels."""
    if "stage_sizes" in network.keywords:
        return functools.partial(network, stage_sizes=(1,) * len(network.keywords["stage_sizes"]))
    if network.func is CifarResNet:
        block = network.keywords["block"]
        return functools.partial(network, depth=3 * getattr(block, "func", block).depth + 2)
    # Two layers in each block keep all numbers of channels divisible by 6.
    return functools.partial(network, depth=16)


# One of those networks that differ only in the number of blocks.
DISTINCT = list({shallow(network)(): name for name, network in NETWORKS.items()}.values())


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *((DISTINCT[0], norm) for norm in NORM_FACTORIES),
        # These two have requirements on numbers of channels; one of them has statistics.
        *((name, norm) for name in DISTINCT[1:] for norm in ("gn", GROUP_BCN)),
    ],
)
def test_takes_every_normalization(name, norm):
    """This checks shapes of variables, and of a training call's logits and statistics."""
    groups = GROUPS.get(name, 16 if NETWORKS[name]().num_classes == 10 else 32)
    model = shallow(NETWORKS[name])(conv=WSConv, norm=NORM_FACTORIES[norm](groups))
    size = image_size(model)
    variables = abstract_variables(model, size)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

    def train(variables, images):
        return model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )

    logits, updates = jax.eval_shape(train, variables, images)
    assert logits == jax.ShapeDtypeStruct((2, model.num_classes), jnp.float32)
    assert updates.get("batch_stats") == variables.get("batch_stats")


@pytest.mark.parametrize("name", DISTINCT)
def test_standardization_does_not_depend_on_the_normalization(name):
    """The names of the normalization's parameters do not matter."""
    network = shallow(NETWORKS[name])
    model = network(norm=NORM_FACTORIES[GROUP_BCN](GROUPS.get(name, 2)))
    check_standardized(abstract_variables(model, image_size(model))["params"])
