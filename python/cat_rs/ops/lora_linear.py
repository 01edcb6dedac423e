"""A frozen linear layer with a LoRA branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cat_rs._native import core_of
from cat_rs.arguments import as_float, check_tensor
from cat_rs.errors import InvalidValueError
from cat_rs.ops.operator import empty_for_none, fake_gradients, none_for_empty, reraise, rounded

__all__ = ["LoraLinearFunction", "WeightCopyFunction", "lora_linear"]


class WeightCopyFunction(torch.autograd.Function):
    """A weight's copy in low precision in the weight's place: its gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd converts a gradient to the dtype of what it belongs to.
        return grad, None


class LoraLinearFunction(torch.autograd.Function):
    """y = x W^T + b + scaling (x A^T) B^T with W frozen; saves x and scaling * x A^T.

    ``copies`` are A and B in x's dtype where somebody keeps them; else float32 ones are rounded here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        copies: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        low_A, low_B = copies or (rounded(lora_A, x.dtype), rounded(lora_B, x.dtype))
        y, hidden = core_of(x).lora_linear_forward(x, weight, bias, low_A, low_B, scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, low_A, low_B, hidden)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, low_A, low_B, hidden = ctx.saved_tensors
        needs, scaling = ctx.needs_input_grad, ctx.scaling
        # Autograd converts the gradients of float32 A and B, which come in x's dtype.
        if torch.is_grad_enabled():  # create_graph=True: operations that can be differentiated again
            lora_A, lora_B = rounded(lora_A, x.dtype), rounded(lora_B, x.dtype)
            count = x.shape[:-1].numel()
            rows, grad_rows = x.reshape(count, x.shape[-1]), grad.reshape(count, grad.shape[-1])
            inner = scaling * (grad_rows @ lora_B)
            dx = (grad_rows @ weight + inner @ lora_A).view_as(x) if needs[0] else None
            dA, dB = inner.T @ rows, scaling * (grad_rows.T @ (rows @ lora_A.T))
        else:
            wanted = (needs[0], needs[3], needs[4])
            dx, dA, dB = core_of(x).lora_linear_backward(grad, x, weight, low_A, low_B, hidden, scaling, wanted)
        return dx, None, grad.sum_to_size(grad.shape[-1]) if needs[2] else None, dA, dB, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """A frozen linear layer with a LoRA branch (Hu et al., arXiv 2106.09685).

    y = x W^T + b + scaling (x A^T) B^T. Gradients, with g = dL/dy: dB = scaling g^T (x A^T),
    dA = scaling (g B)^T x, dx = g W + scaling (g B) A, the last only where x needs it. Saves x and the [M, r]
    product scaling x A^T for the backward pass.

    A and B may be float32 beside x and W in bfloat16 or float16. Then the branch is computed in x's dtype, with A and
    B rounded to it once, and their gradients are products in x's dtype converted to float32. In float16 these need
    the usual loss scale: for a small B, g B is below the smallest float16.

    Args:
        x: [..., in]; float32, float64, bfloat16 or float16.
        weight: W, [out, in], frozen, in x's dtype.
        bias: b, [out], or None; trained if it requires a gradient.
        lora_A: A, [r, in], in x's dtype, or float32 beside bfloat16 and float16.
        lora_B: B, [out, r], likewise.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.

    Returns:
        y, [..., out], in x's dtype.

    Raises:
        ShapeError, DtypeError, DeviceError, InvalidValueError: Naming the argument, what was expected and what came.
    """
    for name, value in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        check_tensor("lora_linear", name, value)
    if weight.requires_grad:
        raise InvalidValueError(
            "lora_linear: `weight` must be frozen, got a tensor with requires_grad=True: call requires_grad_(False)"
        )
    if torch.compiler.is_compiling():
        lora_A, lora_B = rounded(lora_A, x.dtype), rounded(lora_B, x.dtype)
        return lora_linear_operator(x, weight, bias, lora_A, lora_B, scaling)[0]
    factor = scaling if type(scaling) is float else as_float("lora_linear", "scaling", scaling)
    try:
        return LoraLinearFunction.apply(x, weight, bias, lora_A, lora_B, factor, None)
    except RuntimeError as error:
        reraise("lora_linear", error, x=x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B)


@torch.library.custom_op("cat_rs::lora_linear", mutates_args=())
def lora_linear_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """See :func:`lora_linear`. Returns y and scaling * x A^T, [M, r]."""
    return core_of(x).lora_linear_forward(x, weight, bias, lora_A, lora_B, scaling)


@lora_linear_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((rows, lora_A.shape[0]))


@torch.library.custom_op("cat_rs::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    hidden: Tensor,
    scaling: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    gradients = core_of(x).lora_linear_backward(grad, x, weight, lora_A, lora_B, hidden, scaling, tuple(wanted))
    return empty_for_none(gradients, (x, lora_A, lora_B))


@_lora_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *others: Any) -> list[Tensor]:
    return fake_gradients((x, lora_A, lora_B), others[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, ctx.scaling = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1])


def _differentiate(ctx: Any, grad: Tensor, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[3], needs[4]]
    dx, dA, dB = none_for_empty(_lora_linear_backward(grad, *ctx.saved_tensors, ctx.scaling, wanted), wanted)
    return dx, None, grad.sum_to_size(grad.shape[-1]) if needs[2] else None, dA, dB, None


lora_linear_operator.register_autograd(_differentiate, setup_context=_save)
