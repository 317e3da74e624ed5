"""The training step, what parallelizes and accumulates it, and the loop around it."""

from wsbcn_flax.training._checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWarning,
    CorruptCheckpointError,
    NonFiniteStateError,
    Restored,
)
from wsbcn_flax.training._evaluation import EvalStep, evaluate, make_eval_step
from wsbcn_flax.training._loop import LoopConfig, NonFiniteLossError, fit
from wsbcn_flax.training._micro_batches import Batch, LossFn, Metrics, MicroBatches, split_batch
from wsbcn_flax.training._optimizer import OptimizerConfig, kernel_mask
from wsbcn_flax.training._partition import Partition
from wsbcn_flax.training._progress import Progress
from wsbcn_flax.training._state import TrainState
from wsbcn_flax.training._step import TrainStep, make_train_step
from wsbcn_flax.training._tasks import Classification, Task
from wsbcn_flax.training._writers import (
    JsonlWriter,
    MetricWriter,
    MultiWriter,
    TensorBoardWriter,
    read_jsonl,
)

__all__ = [
    "Batch",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointWarning",
    "Checkpointer",
    "Classification",
    "CorruptCheckpointError",
    "EvalStep",
    "JsonlWriter",
    "LoopConfig",
    "LossFn",
    "MetricWriter",
    "Metrics",
    "MicroBatches",
    "MultiWriter",
    "NonFiniteLossError",
    "NonFiniteStateError",
    "OptimizerConfig",
    "Partition",
    "Progress",
    "Restored",
    "Task",
    "TensorBoardWriter",
    "TrainState",
    "TrainStep",
    "evaluate",
    "fit",
    "kernel_mask",
    "make_eval_step",
    "make_train_step",
    "read_jsonl",
    "split_batch",
]
