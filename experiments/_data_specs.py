"""Sizes of the data sets, for what is done without them: lowering, compiling, counting."""

from typing import NamedTuple


class DataSpec(NamedTuple):
    """Training images, classes, and the shape [H, W, C] of an image in a batch."""

    train_size: int
    num_classes: int
    image_shape: tuple[int, int, int]


DATA_SPECS = {
    "mnist5k": DataSpec(4_000, 10, (28, 28, 1)),
    "digits": DataSpec(1_437, 10, (8, 8, 1)),
    "fashion_mnist": DataSpec(60_000, 10, (28, 28, 1)),
    "cifar10": DataSpec(50_000, 10, (32, 32, 3)),
    "cifar100": DataSpec(50_000, 100, (32, 32, 3)),
    "imagenet": DataSpec(1_281_167, 1000, (224, 224, 3)),
}
