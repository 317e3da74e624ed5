"""CIFAR-10 and CIFAR-100, as bearpaw/pytorch-classification trains on them.

    python -m experiments.train cifar10_resnet110_bcn_ws

The authors forked that code base; its TRAINING.md gives these numbers. SGD with momentum 0.9 from a
rate of 0.1, times ``decay`` at every milestone. Weight decay of all parameters. Crops of images
padded by 4 pixels, and flips. The groups are the most, up to 32, that divide the narrowest layer
into groups of four or more channels.
"""

from experiments.recipes._table import Published, Training

TRAININGS = {
    **{
        name: Training(epochs=164, milestones=(81, 122), batch=128, groups=4)
        for name in (
            "resnet20",
            "resnet32",
            "resnet44",
            "resnet56",
            "resnet110",
            "preresnet110",
            "preresnet164",
        )
    },
    "resnext29_8x64d": Training(
        epochs=300, milestones=(150, 225), batch=128, groups=16, weight_decay=5e-4
    ),
    "wrn28_10": Training(
        epochs=200,
        milestones=(60, 120, 160),
        batch=128,
        groups=4,
        weight_decay=5e-4,
        decay=0.2,
    ),
    "vgg16": Training(epochs=164, milestones=(81, 122), batch=128, groups=16, weight_decay=5e-4),
    "vgg19": Training(epochs=164, milestones=(81, 122), batch=128, groups=16, weight_decay=5e-4),
    "densenet100_12": Training(epochs=300, milestones=(150, 225), batch=64, groups=6),
}

# Error in %, and FLOPs of the convolutions, forward and backward. WRN-28-10 has dropout 0.3.
# PreResNet-110 there stacked 18 bottlenecks a stage, which the papers count as 164 layers: the
# published number is that of preresnet164 here.
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
