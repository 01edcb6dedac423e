"""Devices that work asynchronously, and numbers of the host on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch

from cat_rs.dtypes import wide_dtype

__all__ = ["DeviceValues", "is_gpu", "send", "warn_of_slow_bfloat16"]


def is_gpu(device: torch.device) -> bool:
    """Whether the device works through a queue, so that reading one of its values waits for all work before it."""
    return device.type != "cpu"


def warn_of_slow_bfloat16(op: str, device: torch.device, tensors: Iterable[torch.Tensor]) -> None:
    """Warns where a card below compute capability 8.0 would emulate the tensors' bfloat16."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        warnings.warn(
            f"{op}: `model` is in bfloat16, which a card of compute capability {major}.{minor} emulates slowly: use "
            "float16 with a grad_scaler",
            RuntimeWarning,
            stacklevel=3,
        )


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; where it comes from the CPU, nobody waits for its copy."""
    if tensor.device == device or device.type != "cuda":
        return tensor.to(device)
    # PyTorch hands the pinned memory out again only when the copy has been made.
    return tensor.pin_memory().to(device, non_blocking=True)


class DeviceValues:
    """Numbers in the widest float dtype of a device that the host sets without waiting.

    Attributes:
        tensor: The numbers, [K], at an address that stays, which recorded graphs read.
    """

    def __init__(self, values: Sequence[float], device: torch.device) -> None:
        self.tensor = torch.tensor(values, dtype=wide_dtype(device), device=device)
        self._written: list[float | None] = [float(value) for value in values]

    def write(self, values: Sequence[float | torch.Tensor]) -> None:
        """Sets the numbers that changed; those in tensors on the device are copied there."""
        for index, value in enumerate(values):
            if isinstance(value, torch.Tensor) and value.device == self.tensor.device:
                self.tensor[index].copy_(value.detach())
                self._written[index] = None
            elif value != self._written[index]:
                # fill_ passes the number to the kernel by value: no host memory is read later.
                self.tensor[index].fill_(float(value))
                self._written[index] = float(value)
