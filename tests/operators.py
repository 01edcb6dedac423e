"""PyTorch's own checks of a registered operator."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def draw(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers, with a gradient where wanted."""
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def check_operator(name: str, *arguments: Any) -> None:
    """The schema, the fake, autograd and tracing of ``torch.ops.cat_rs.<name>`` agree with what it computes."""
    with warnings.catch_warnings():
        # PyTorch 2.15 hides its own look at .grad only where warnings are no errors.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        torch.library.opcheck(getattr(torch.ops.cat_rs, name).default, arguments)
