"""CIFAR-10 and CIFAR-100, as bearpaw/pytorch-classification trains on them.

    python -m experiments.train cifar10_resnet110_bcn_ws

The authors forked that code base; its TRAINING.md gives these numbers. SGD has momentum 0.9 and a
learning rate of 0.1, which is multiplied by ``decay`` at every milestone. Weight decay applies to
all parameters. Images are padded by 4 pixels, cropped and flipped. The number of groups is the
largest, up to 32, that divides the narrowest layer into groups of four or more channels.
"""

import functools

from experiments._classification import ClassificationRecipe
from experiments._recipe import DataConfig
from experiments.recipes._table import Published, step_recipe

_RESNETS = (
    *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110)),
    *(f"preresnet{depth}" for depth in (110, 164)),
)


def _recipes(name: str) -> list[ClassificationRecipe]:
    data = DataConfig(name=name, crop_padding=4, flip=True)
    long = functools.partial(step_recipe, data, epochs=300, milestones=(150.0, 225.0))
    short = functools.partial(step_recipe, data, epochs=164, milestones=(81.0, 122.0), batch=128)
    return [
        *(short(model, groups=4) for model in _RESNETS),
        long("resnext29_8x64d", batch=128, groups=16, weight_decay=5e-4),
        step_recipe(
            data,
            "wrn28_10",
            epochs=200,
            milestones=(60.0, 120.0, 160.0),
            batch=128,
            groups=4,
            weight_decay=5e-4,
            decay=0.2,
        ),
        short("vgg16", groups=16, weight_decay=5e-4),
        short("vgg19", groups=16, weight_decay=5e-4),
        long("densenet100_12", batch=64, groups=6),
    ]


RECIPES = [*_recipes("cifar10"), *_recipes("cifar100")]

# Error in %, and FLOPs of the convolutions, forward and backward. WRN-28-10 has dropout 0.3.
# PreResNet-110 in that code stacks 18 bottlenecks a stage, which the papers count as 164 layers.
# Its published number belongs to preresnet164 here.
SOURCE = "README of bearpaw/pytorch-classification"
PUBLISHED = {
    "cifar10_resnet110_bn": Published("6.11 %", SOURCE, 1.2e16),
    "cifar100_resnet110_bn": Published("28.86 %", SOURCE, 1.2e16),
    "cifar10_preresnet110_bn": Published("4.94 %, see preresnet164", SOURCE, 1.2e16),
    "cifar100_preresnet110_bn": Published("23.65 %, see preresnet164", SOURCE, 1.2e16),
    "cifar10_resnext29_8x64d_bn": Published("3.69 %", SOURCE, 4.8e17),
    "cifar100_resnext29_8x64d_bn": Published("17.38 %", SOURCE, 4.8e17),
    "cifar10_wrn28_10_bn": Published("3.79 %", SOURCE, 3.1e17),
    "cifar100_wrn28_10_bn": Published("18.14 %", SOURCE, 3.1e17),
}
