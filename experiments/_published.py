"""The recipes that repeat a published result, or train the same network with BCN and WS.

Each documents its command, the error to expect and where that number comes from, and its cost: the
steps, and the floating-point operations of the convolutions forward and backward.
"""

from collections.abc import Callable

from experiments._config import Recipe
from experiments._recipes import get_recipe


def imagenet_resnet50_gn_ws() -> Recipe:
    """ResNet-50, GN+WS, on ImageNet.

    Command: python -m experiments.train imagenet_resnet50_gn_ws
    Expected: 23.72 % top-1 and 6.99 % top-5 error: the authors' Weight Standardization README.
    Cost: 450,360 steps of 256 images, 2.8e+18 FLOPs (3 x 8.2 GFLOPs an image).
    """
    return get_recipe("imagenet_resnet50_gn_ws")


def imagenet_resnet101_gn_ws() -> Recipe:
    """ResNet-101, GN+WS, on ImageNet.

    Command: python -m experiments.train imagenet_resnet101_gn_ws
    Expected: 22.10 % top-1 and 6.07 % top-5 error: the authors' Weight Standardization README.
    Cost: 1,000,900 steps of 128 images, 6.0e+18 FLOPs (3 x 15.6 GFLOPs an image).
    """
    return get_recipe("imagenet_resnet101_gn_ws")


def imagenet_resnext50_32x4d_gn_ws() -> Recipe:
    """ResNeXt-50 32x4d, GN+WS, on ImageNet.

    Command: python -m experiments.train imagenet_resnext50_32x4d_gn_ws
    Expected: 22.71 % top-1 and 6.38 % top-5 error: the authors' Weight Standardization README.
    Cost: 1,000,900 steps of 128 images, 3.3e+18 FLOPs (3 x 8.5 GFLOPs an image).
    """
    return get_recipe("imagenet_resnext50_32x4d_gn_ws")


def imagenet_resnext101_32x4d_gn_ws() -> Recipe:
    """ResNeXt-101 32x4d, GN+WS, on ImageNet.

    Command: python -m experiments.train imagenet_resnext101_32x4d_gn_ws
    Expected: 21.80 % top-1 and 6.03 % top-5 error: the authors' Weight Standardization README.
    Cost: 1,000,900 steps of 128 images, 6.1e+18 FLOPs (3 x 15.9 GFLOPs an image).
    """
    return get_recipe("imagenet_resnext101_32x4d_gn_ws")


def imagenet_resnet50_bcn_ws() -> Recipe:
    """ResNet-50, BCN+WS, on ImageNet, micro-batches of any size.

    Command: python -m experiments.train imagenet_resnet50_bcn_ws
    Expected: no verified number; GN+WS reaches 23.72 % top-1 and 6.99 % top-5 error.
    Cost: 450,360 steps of 256 images, 2.8e+18 FLOPs (3 x 8.2 GFLOPs an image).
    """
    return get_recipe("imagenet_resnet50_bcn_ws")


def imagenet_resnet101_bcn_ws() -> Recipe:
    """ResNet-101, BCN+WS, on ImageNet, micro-batches of any size.

    Command: python -m experiments.train imagenet_resnet101_bcn_ws
    Expected: no verified number; GN+WS reaches 22.10 % top-1 and 6.07 % top-5 error.
    Cost: 1,000,900 steps of 128 images, 6.0e+18 FLOPs (3 x 15.6 GFLOPs an image).
    """
    return get_recipe("imagenet_resnet101_bcn_ws")


def imagenet_resnext50_32x4d_bcn_ws() -> Recipe:
    """ResNeXt-50 32x4d, BCN+WS, on ImageNet, micro-batches of any size.

    Command: python -m experiments.train imagenet_resnext50_32x4d_bcn_ws
    Expected: no verified number; GN+WS reaches 22.71 % top-1 and 6.38 % top-5 error.
    Cost: 1,000,900 steps of 128 images, 3.3e+18 FLOPs (3 x 8.5 GFLOPs an image).
    """
    return get_recipe("imagenet_resnext50_32x4d_bcn_ws")


def imagenet_resnext101_32x4d_bcn_ws() -> Recipe:
    """ResNeXt-101 32x4d, BCN+WS, on ImageNet, micro-batches of any size.

    Command: python -m experiments.train imagenet_resnext101_32x4d_bcn_ws
    Expected: no verified number; GN+WS reaches 21.80 % top-1 and 6.03 % top-5 error.
    Cost: 1,000,900 steps of 128 images, 6.1e+18 FLOPs (3 x 15.9 GFLOPs an image).
    """
    return get_recipe("imagenet_resnext101_32x4d_bcn_ws")


def cifar10_resnet110_bn() -> Recipe:
    """ResNet-110, BN, on CIFAR-10.

    Command: python -m experiments.train cifar10_resnet110_bn
    Expected: 6.11 % error: README of bearpaw/pytorch-classification, which the authors forked.
    Cost: 63,960 steps of 128 images, 1.2e+16 FLOPs (3 x 0.5 GFLOPs an image).
    """
    return get_recipe("cifar10_resnet110_bn")


def cifar10_resnet110_bcn_ws() -> Recipe:
    """ResNet-110, BCN+WS, on CIFAR-10, micro-batches of any size.

    Command: python -m experiments.train cifar10_resnet110_bcn_ws
    Expected: no verified number; BN reaches 6.11 %.
    Cost: 63,960 steps of 128 images, 1.2e+16 FLOPs (3 x 0.5 GFLOPs an image).
    """
    return get_recipe("cifar10_resnet110_bcn_ws")


def cifar100_resnet110_bn() -> Recipe:
    """ResNet-110, BN, on CIFAR-100.

    Command: python -m experiments.train cifar100_resnet110_bn
    Expected: 28.86 % error: README of bearpaw/pytorch-classification, which the authors forked.
    Cost: 63,960 steps of 128 images, 1.2e+16 FLOPs (3 x 0.5 GFLOPs an image).
    """
    return get_recipe("cifar100_resnet110_bn")


def cifar100_resnet110_bcn_ws() -> Recipe:
    """ResNet-110, BCN+WS, on CIFAR-100, micro-batches of any size.

    Command: python -m experiments.train cifar100_resnet110_bcn_ws
    Expected: no verified number; BN reaches 28.86 %.
    Cost: 63,960 steps of 128 images, 1.2e+16 FLOPs (3 x 0.5 GFLOPs an image).
    """
    return get_recipe("cifar100_resnet110_bcn_ws")


def cifar10_preresnet110_bn() -> Recipe:
    """PreResNet-110, BN, on CIFAR-10.

    Command: python -m experiments.train cifar10_preresnet110_bn
    Expected: 4.94 % error: README of bearpaw/pytorch-classification, which the authors forked.
        Its code at that depth stacked 18 bottlenecks a stage, which the papers count as 164
        layers: cifar10_preresnet164_bn.
    Cost: 63,960 steps of 128 images, 1.2e+16 FLOPs (3 x 0.5 GFLOPs an image).
    """
    return get_recipe("cifar10_preresnet110_bn")


def cifar10_preresnet110_bcn_ws() -> Recipe:
    """PreResNet-110, BCN+WS, on CIFAR-10, micro-batches of any size.

    Command: python -m experiments.train cifar10_preresnet110_bcn_ws
    Expected: no verified number; BN reaches 4.94 %.
    Cost: 63,960 steps of 128 images, 1.2e+16 FLOPs (3 x 0.5 GFLOPs an image).
    """
    return get_recipe("cifar10_preresnet110_bcn_ws")


def cifar100_preresnet110_bn() -> Recipe:
    """PreResNet-110, BN, on CIFAR-100.

    Command: python -m experiments.train cifar100_preresnet110_bn
    Expected: 23.65 % error: README of bearpaw/pytorch-classification, which the authors forked.
        Its code at that depth stacked 18 bottlenecks a stage, which the papers count as 164
        layers: cifar100_preresnet164_bn.
    Cost: 63,960 steps of 128 images, 1.2e+16 FLOPs (3 x 0.5 GFLOPs an image).
    """
    return get_recipe("cifar100_preresnet110_bn")


def cifar100_preresnet110_bcn_ws() -> Recipe:
    """PreResNet-110, BCN+WS, on CIFAR-100, micro-batches of any size.

    Command: python -m experiments.train cifar100_preresnet110_bcn_ws
    Expected: no verified number; BN reaches 23.65 %.
    Cost: 63,960 steps of 128 images, 1.2e+16 FLOPs (3 x 0.5 GFLOPs an image).
    """
    return get_recipe("cifar100_preresnet110_bcn_ws")


def cifar10_resnext29_8x64d_bn() -> Recipe:
    """ResNeXt-29 8x64d, BN, on CIFAR-10.

    Command: python -m experiments.train cifar10_resnext29_8x64d_bn
    Expected: 3.69 % error: README of bearpaw/pytorch-classification, which the authors forked.
    Cost: 117,000 steps of 128 images, 4.8e+17 FLOPs (3 x 10.8 GFLOPs an image).
    """
    return get_recipe("cifar10_resnext29_8x64d_bn")


def cifar10_resnext29_8x64d_bcn_ws() -> Recipe:
    """ResNeXt-29 8x64d, BCN+WS, on CIFAR-10, micro-batches of any size.

    Command: python -m experiments.train cifar10_resnext29_8x64d_bcn_ws
    Expected: no verified number; BN reaches 3.69 %.
    Cost: 117,000 steps of 128 images, 4.8e+17 FLOPs (3 x 10.8 GFLOPs an image).
    """
    return get_recipe("cifar10_resnext29_8x64d_bcn_ws")


def cifar100_resnext29_8x64d_bn() -> Recipe:
    """ResNeXt-29 8x64d, BN, on CIFAR-100.

    Command: python -m experiments.train cifar100_resnext29_8x64d_bn
    Expected: 17.38 % error: README of bearpaw/pytorch-classification, which the authors forked.
    Cost: 117,000 steps of 128 images, 4.8e+17 FLOPs (3 x 10.8 GFLOPs an image).
    """
    return get_recipe("cifar100_resnext29_8x64d_bn")


def cifar100_resnext29_8x64d_bcn_ws() -> Recipe:
    """ResNeXt-29 8x64d, BCN+WS, on CIFAR-100, micro-batches of any size.

    Command: python -m experiments.train cifar100_resnext29_8x64d_bcn_ws
    Expected: no verified number; BN reaches 17.38 %.
    Cost: 117,000 steps of 128 images, 4.8e+17 FLOPs (3 x 10.8 GFLOPs an image).
    """
    return get_recipe("cifar100_resnext29_8x64d_bcn_ws")


def cifar10_wrn28_10_bn() -> Recipe:
    """WRN-28-10, dropout 0.3, BN, on CIFAR-10.

    Command: python -m experiments.train cifar10_wrn28_10_bn
    Expected: 3.79 % error: README of bearpaw/pytorch-classification, which the authors forked.
    Cost: 78,000 steps of 128 images, 3.1e+17 FLOPs (3 x 10.5 GFLOPs an image).
    """
    return get_recipe("cifar10_wrn28_10_bn")


def cifar10_wrn28_10_bcn_ws() -> Recipe:
    """WRN-28-10, dropout 0.3, BCN+WS, on CIFAR-10, micro-batches of any size.

    Command: python -m experiments.train cifar10_wrn28_10_bcn_ws
    Expected: no verified number; BN reaches 3.79 %.
    Cost: 78,000 steps of 128 images, 3.1e+17 FLOPs (3 x 10.5 GFLOPs an image).
    """
    return get_recipe("cifar10_wrn28_10_bcn_ws")


def cifar100_wrn28_10_bn() -> Recipe:
    """WRN-28-10, dropout 0.3, BN, on CIFAR-100.

    Command: python -m experiments.train cifar100_wrn28_10_bn
    Expected: 18.14 % error: README of bearpaw/pytorch-classification, which the authors forked.
    Cost: 78,000 steps of 128 images, 3.1e+17 FLOPs (3 x 10.5 GFLOPs an image).
    """
    return get_recipe("cifar100_wrn28_10_bn")


def cifar100_wrn28_10_bcn_ws() -> Recipe:
    """WRN-28-10, dropout 0.3, BCN+WS, on CIFAR-100, micro-batches of any size.

    Command: python -m experiments.train cifar100_wrn28_10_bcn_ws
    Expected: no verified number; BN reaches 18.14 %.
    Cost: 78,000 steps of 128 images, 3.1e+17 FLOPs (3 x 10.5 GFLOPs an image).
    """
    return get_recipe("cifar100_wrn28_10_bcn_ws")


PUBLISHED: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        imagenet_resnet50_gn_ws,
        imagenet_resnet101_gn_ws,
        imagenet_resnext50_32x4d_gn_ws,
        imagenet_resnext101_32x4d_gn_ws,
        imagenet_resnet50_bcn_ws,
        imagenet_resnet101_bcn_ws,
        imagenet_resnext50_32x4d_bcn_ws,
        imagenet_resnext101_32x4d_bcn_ws,
        cifar10_resnet110_bn,
        cifar10_resnet110_bcn_ws,
        cifar100_resnet110_bn,
        cifar100_resnet110_bcn_ws,
        cifar10_preresnet110_bn,
        cifar10_preresnet110_bcn_ws,
        cifar100_preresnet110_bn,
        cifar100_preresnet110_bcn_ws,
        cifar10_resnext29_8x64d_bn,
        cifar10_resnext29_8x64d_bcn_ws,
        cifar100_resnext29_8x64d_bn,
        cifar100_resnext29_8x64d_bcn_ws,
        cifar10_wrn28_10_bn,
        cifar10_wrn28_10_bcn_ws,
        cifar100_wrn28_10_bn,
        cifar100_wrn28_10_bcn_ws,
    )
}
