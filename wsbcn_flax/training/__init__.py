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
from wsbcn_flax.training._memory import Fit, device_bytes, largest_that_fits
from wsbcn_flax.training._micro_batches import Batch, LossFn, Metrics, MicroBatches, split_batch
from wsbcn_flax.training._optimizer import OptimizerConfig, kernel_mask
from wsbcn_flax.training._partition import Partition
from wsbcn_flax.training._preemption import (
    PREEMPTED_STATUS,
    PreemptedError,
    StopRule,
    stop_on_sigterm,
)
from wsbcn_flax.training._processes import (
    is_first_process,
    join_processes,
    leave,
    on_first_process,
)
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
    "PREEMPTED_STATUS",
    "Batch",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointWarning",
    "Checkpointer",
    "Classification",
    "CorruptCheckpointError",
    "EvalStep",
    "Fit",
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
    "PreemptedError",
    "Progress",
    "Restored",
    "StopRule",
    "Task",
    "TensorBoardWriter",
    "TrainState",
    "TrainStep",
    "device_bytes",
    "evaluate",
    "fit",
    "is_first_process",
    "join_processes",
    "kernel_mask",
    "largest_that_fits",
    "leave",
    "make_eval_step",
    "make_train_step",
    "on_first_process",
    "read_jsonl",
    "split_batch",
    "stop_on_sigterm",
]
