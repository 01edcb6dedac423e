"""A frozen linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cat_rs.composed.checks import Checks, undisturbed

__all__ = ["frozen_linear_backward", "frozen_linear_forward"]


@undisturbed
def frozen_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b. See `cat_rs.ops.frozen_linear.frozen_linear`."""
    checks = _check("x", x, weight, bias)
    if bias is not None:
        checks.shape("bias", bias, weight.shape[:1])
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        checks.refuse_shape("x", f"[..., {weight.shape[1]}]", x)
    return F.linear(x, weight, bias)


@undisturbed
def frozen_linear_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """dL/dx of `frozen_linear_forward`."""
    checks = _check("grad", grad, weight, None)
    if grad.dim() == 0 or grad.shape[-1] != len(weight):
        checks.refuse_shape("grad", f"[..., {len(weight)}]", grad)
    return grad @ weight


def _check(argument: str, tensor: Tensor, weight: Tensor, bias: Tensor | None) -> Checks:
    checks = Checks("frozen_linear")
    dtype = checks.floats(argument, tensor).dtype
    for name, own in (("weight", weight), ("bias", bias)):
        if own is not None:
            checks.beside(name, own, argument, dtype, "the dtype of the input")
    if weight.dim() != 2:
        checks.refuse_shape("weight", "[out, in]", weight)
    return checks
