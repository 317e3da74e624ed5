"""The training step, what parallelizes and accumulates it, and the loop around it."""

from wsbcn_flax.training._micro_batches import LossFn, MicroBatches, split_batch
from wsbcn_flax.training._partition import Partition
from wsbcn_flax.training._state import TrainState
from wsbcn_flax.training._step import TrainStep, make_train_step

__all__ = [
    "LossFn",
    "MicroBatches",
    "Partition",
    "TrainState",
    "TrainStep",
    "make_train_step",
    "split_batch",
]
