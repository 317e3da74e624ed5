"""Functions from parameters to parameters."""

from wsbcn_flax.transforms._weight_standardization import WeightStandardization

__all__ = ["WeightStandardization"]
