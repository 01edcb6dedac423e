"""The dtypes that operations take, and those that they compute in."""

from __future__ import annotations

import torch

__all__ = ["FLOAT_DTYPES", "FLOAT_NAMES", "compute_dtype", "wide_dtype"]

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, float64, bfloat16 or float16"


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums and settings have on a device: float64, where the device knows it."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64
