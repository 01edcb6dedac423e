"""The CAT training step and its parts."""

from cat_rs.step.cat_step import CatStep, StepMetrics

__all__ = ["CatStep", "StepMetrics"]
