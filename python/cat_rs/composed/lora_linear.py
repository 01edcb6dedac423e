"""A frozen linear layer with a LoRA branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_rs.composed.checks import Checks, undisturbed

__all__ = ["lora_linear_backward", "lora_linear_forward"]


@undisturbed
def lora_linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """See `cat_rs.lora_linear`. Returns y and scaling * x A^T, [M, r]."""
    _check(x, weight, bias, lora_a, lora_b, scaling)
    rows = _rows(x)
    hidden = scaling * (rows @ lora_a.T)
    y = F.linear(rows, weight, bias).addmm_(hidden, lora_b.T)
    # Autograd would refuse to let others add to a plain view in place.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)]), hidden


@undisturbed
def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `lora_linear_forward`: (dx, dA, dB), each where wanted."""
    checks = _check(x, weight, None, lora_a, lora_b, scaling)
    rows = _rows(x)
    shapes = ("grad", grad, (*x.shape[:-1], len(weight))), ("hidden", hidden, (len(rows), len(lora_a)))
    for name, tensor, shape in shapes:
        checks.beside(name, tensor, "x", x.dtype, "the dtype of `x`")
        checks.shape(name, tensor, shape)
    grad_rows = grad.reshape(len(rows), len(weight))
    inner = scaling * (grad_rows @ lora_b)
    dx = (grad_rows @ weight).addmm_(inner, lora_a).view(x.shape) if wanted[0] else None
    return dx, inner.T @ rows if wanted[1] else None, grad_rows.T @ hidden if wanted[2] else None


def _rows(tensor: Tensor) -> Tensor:
    """[..., d] as [M, d]."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Checks:
    checks = Checks("lora_linear")
    dtype = checks.floats("x", x).dtype
    for name, tensor in (("weight", weight), ("bias", bias), ("lora_A", lora_a), ("lora_B", lora_b)):
        if tensor is not None:
            checks.beside(name, tensor, "x", dtype, "the dtype of `x`")
    if weight.dim() != 2:
        checks.refuse_shape("weight", "[out, in]", weight)
    out, inner = weight.shape
    if x.dim() == 0 or x.shape[-1] != inner:
        checks.refuse_shape("x", f"[..., {inner}]", x)
    rank = lora_a.shape[0] if lora_a.dim() else 0
    checks.shape("lora_A", lora_a, [rank, inner])
    checks.shape("lora_B", lora_b, [out, rank])
    if bias is not None:
        checks.shape("bias", bias, [out])
    checks.finite("scaling", scaling)
    return checks
