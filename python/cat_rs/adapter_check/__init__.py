"""What an adapter file does to a model."""

from cat_rs.adapter_check.weights import Finding, LayerUpdate, WeightReport, check_weights

__all__ = ["Finding", "LayerUpdate", "WeightReport", "check_weights"]
