"""What an adapter file does to a model."""

from cat_rs.adapter_check.checking import check
from cat_rs.adapter_check.result import (
    AdapterCheck,
    CheckResult,
    PictureCheck,
    ScaleCheck,
    Stack,
    StackCheck,
    StackedAdapter,
)
from cat_rs.adapter_check.weights import Finding, LayerUpdate, WeightReport, check_weights

__all__ = [
    "AdapterCheck",
    "CheckResult",
    "Finding",
    "LayerUpdate",
    "PictureCheck",
    "ScaleCheck",
    "Stack",
    "StackCheck",
    "StackedAdapter",
    "WeightReport",
    "check",
    "check_weights",
]
