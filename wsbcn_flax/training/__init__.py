"""The training step, its parallelization and accumulation, the training loop, and experiments.

Plumbing is in named modules: ``checkpoints``, ``ahead_of_time``, ``preemption``, ``processes``,
``progress`` and ``writers``.
"""

from wsbcn_flax.training._batch_config import BatchConfig
from wsbcn_flax.training._evaluation import (
    Average,
    EvalStep,
    Evaluator,
    NonFiniteLossError,
    evaluate,
    make_eval_step,
)
from wsbcn_flax.training._experiment import Data, Experiment, Program
from wsbcn_flax.training._loop import LoopConfig, fit
from wsbcn_flax.training._micro_batches import MicroBatches, split_batch
from wsbcn_flax.training._optimizer import OptimizerConfig, kernel_mask
from wsbcn_flax.training._partition import Partition
from wsbcn_flax.training._state import TrainState, init_state
from wsbcn_flax.training._step import TrainStep, make_train_step
from wsbcn_flax.training.checkpoints import Checkpointer, CheckpointError

__all__ = [
    "Average",
    "BatchConfig",
    "CheckpointError",
    "Checkpointer",
    "Data",
    "EvalStep",
    "Evaluator",
    "Experiment",
    "LoopConfig",
    "MicroBatches",
    "NonFiniteLossError",
    "OptimizerConfig",
    "Partition",
    "Program",
    "TrainState",
    "TrainStep",
    "evaluate",
    "fit",
    "init_state",
    "kernel_mask",
    "make_eval_step",
    "make_train_step",
    "split_batch",
]
