"""Devices whose work is queued: what a step must not wait for, and how numbers of the host get there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["DeviceValues", "is_gpu"]


def is_gpu(device: torch.device) -> bool:
    """Whether the device works through a queue, so that reading one of its values waits for everything before it."""
    return device.type == "cuda"


class DeviceValues:
    """float64 numbers at one address of a device, set by the host without waiting.

    Attributes:
        tensor: The numbers, [K]; recorded graphs read it.
    """

    def __init__(self, values: Sequence[float], device: torch.device) -> None:
        self.tensor = torch.tensor(values, dtype=torch.float64, device=device)
        self._written: list[float | None] = [float(value) for value in values]

    def write(self, values: Sequence[float | torch.Tensor]) -> None:
        """Sets those that changed; tensors are numbers that the device has already."""
        for index, value in enumerate(values):
            if isinstance(value, torch.Tensor) and is_gpu(value.device):
                self.tensor[index].copy_(value.detach())
                self._written[index] = None
            elif value != self._written[index]:
                # The number travels as the kernel's argument: no memory of the host is read later.
                self.tensor[index].fill_(float(value))
                self._written[index] = float(value)
