"""The command experiments.train with resnet8 reduced to a stem and one block.

Tests run `python -m tests.experiments.tiny_train RECIPE` in separate processes.
"""

import functools
import sys

from experiments import _models, train
from wsbcn_flax import models

COMMAND = "tests.experiments.tiny_train"
TINY_NETWORK = functools.partial(
    models.ResNet, stage_sizes=(1,), features=8, block=models.BasicBlock, stem_features=4
)

if __name__ == "__main__":
    _models.MODELS["resnet8"] = TINY_NETWORK
    sys.exit(train.main(sys.argv[1:]))
