"""The CAT training step and its parts."""

from cat_rs.step.cat_step import CatStep, StepMetrics
from cat_rs.step.inputs import PreservationSamples

__all__ = ["CatStep", "PreservationSamples", "StepMetrics"]
