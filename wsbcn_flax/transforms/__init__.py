"""Functions from parameters to parameters, and conversion of other libraries' checkpoints."""

from wsbcn_flax.transforms._checkpoint_specs import (
    CheckpointSpec,
    checkpoint_names,
    checkpoint_spec,
)
from wsbcn_flax.transforms._checkpoints import (
    export_checkpoint,
    guess_checkpoint_name,
    import_checkpoint,
)
from wsbcn_flax.transforms._fold import fold_weight_standardization
from wsbcn_flax.transforms._normalized_convolutions import normalized_convolutions
from wsbcn_flax.transforms._path_rules import ConvolutionKernel
from wsbcn_flax.transforms._weight_standardization import WeightStandardization

__all__ = [
    "CheckpointSpec",
    "ConvolutionKernel",
    "WeightStandardization",
    "checkpoint_names",
    "checkpoint_spec",
    "export_checkpoint",
    "fold_weight_standardization",
    "guess_checkpoint_name",
    "import_checkpoint",
    "normalized_convolutions",
]
