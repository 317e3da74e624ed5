"""Tasks: the losses and evaluations of models, as pure functions for the training loop."""

from wsbcn_flax.tasks._classification import Classification
from wsbcn_flax.tasks._detection import Detection
from wsbcn_flax.tasks._ema import Ema
from wsbcn_flax.tasks._mean import Mean
from wsbcn_flax.tasks._task import Batch, LossFn, Metrics, Task

__all__ = ["Batch", "Classification", "Detection", "Ema", "LossFn", "Mean", "Metrics", "Task"]
