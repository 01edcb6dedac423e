"""A frozen linear layer in products of this package's own, where these are faster than PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cat_rs._native import core_of
from cat_rs.ops.operator import OWN_MATMUL_IS_FASTER

__all__ = ["FrozenLinearFunction", "frozen_linear"]

# Products of fewer multiplications are over before the call is.
MIN_MULTIPLICATIONS = 1_000_000


class FrozenLinearFunction(torch.autograd.Function):
    """y = x W^T + b with W and b frozen; saves nothing of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return core_of(x).frozen_linear_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: an operation that can be differentiated again
            return grad @ weight, None, None
        return core_of(grad).frozen_linear_backward(grad, weight), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` for a frozen weight and bias, in this package's products where they are faster.

    Args:
        x: [..., in].
        weight: W, [out, in].
        bias: b, [out], or None.

    Returns:
        y = x W^T + b, [..., out].
    """
    if not _runs_own_product(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        return FrozenLinearFunction.apply(x, weight, bias)
    return core_of(x).frozen_linear_forward(x, weight, bias)


def _runs_own_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        OWN_MATMUL_IS_FASTER
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.shape[0] >= MIN_MULTIPLICATIONS
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )
