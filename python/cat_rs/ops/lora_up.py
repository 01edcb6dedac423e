"""The up projection of a LoRA branch, added onto the output of its layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cat_rs._native import core_of
from cat_rs.arguments import as_float, check_memory, check_tensor
from cat_rs.ops.operator import empty_for_none, fake_gradients, none_for_empty, rounded

__all__ = ["LoraUpFunction", "lora_up_"]


class LoraUpFunction(torch.autograd.Function):
    """y += scaling B h in place; saves h. ``copy`` is B in y's dtype where somebody keeps it."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        hidden: Tensor,
        lora_B: Tensor,
        scaling: float,
        channels_second: bool,
        copy: Tensor | None,
    ) -> Tensor:
        low_B = rounded(lora_B, y.dtype) if copy is None else copy
        core_of(y).lora_up_forward(y, hidden, low_B, scaling, channels_second)
        ctx.mark_dirty(y)
        ctx.save_for_backward(hidden, lora_B, low_B)
        ctx.settings = scaling, channels_second
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, lora_B, low_B = ctx.saved_tensors
        scaling, channels_second = ctx.settings
        wanted = ctx.needs_input_grad[1:3]
        if torch.is_grad_enabled():  # create_graph=True: operations that can be differentiated again
            lora_B = rounded(lora_B, hidden.dtype)
            channel = 1 if channels_second else -1
            dh = scaling * (grad.movedim(channel, -1) @ lora_B).movedim(-1, channel)
            dB = scaling * grad.movedim(channel, 0).flatten(1) @ hidden.movedim(channel, 0).flatten(1).T
        else:
            dh, dB = core_of(grad).lora_up_backward(grad, hidden, low_B, scaling, channels_second, wanted)
        return grad, dh, dB, None, None, None


def lora_up_(y: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float, *, channels_second: bool = False) -> Tensor:
    """Adds the up projection of a LoRA branch onto a layer's output, in place: y += scaling B h.

    For branches whose down projection h = A x stays a call of its own: convolutions, dropout, further adapters.
    Gradients, with g = dL/dy: dh = scaling B^T g, dB = scaling g h^T, and g goes on to y.

    Args:
        y: The layer's output, [..., out], or [B, out, ...] with ``channels_second``, contiguous or channels_last;
            float32, float64, bfloat16 or float16. Nothing else may hold it for its own backward pass.
        hidden: h, of y's shape with r for out, in y's dtype.
        lora_B: B, [out, r], in y's dtype, or float32 beside bfloat16 and float16: see :func:`cat_rs.lora_linear`.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.
        channels_second: Whether the channels are the second dimension, as in convolutions, or the last.

    Returns:
        y; under torch.compile a new tensor.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, InvalidValueError: Naming the argument, what was expected and
            what came.
    """
    check_tensor("lora_up", "y", y)
    check_tensor("lora_up", "lora_B", lora_B)
    if torch.compiler.is_compiling():
        return lora_up_operator(y, hidden, rounded(lora_B, y.dtype), scaling, channels_second)
    return LoraUpFunction.apply(y, hidden, lora_B, as_float("lora_up", "scaling", scaling), channels_second, None)


@torch.library.custom_op("cat_rs::lora_up", mutates_args=())
def lora_up_operator(y: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float, channels_second: bool) -> Tensor:
    """See :func:`lora_up_`. Returns y + scaling * B h."""
    check_tensor("lora_up", "y", y)
    check_memory("lora_up", "y", y)
    out = y.clone()
    core_of(y).lora_up_forward(out, hidden, lora_B, scaling, channels_second)
    return out


@lora_up_operator.register_fake
def _(y: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(y)


@torch.library.custom_op("cat_rs::lora_up_backward", mutates_args=())
def _lora_up_backward(
    grad: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float, channels_second: bool, wanted: Sequence[bool]
) -> list[Tensor]:
    gradients = core_of(grad).lora_up_backward(grad, hidden, lora_B, scaling, channels_second, tuple(wanted))
    dh, dB = empty_for_none(gradients, (hidden, lora_B))
    return [dh.contiguous(), dB]


@_lora_up_backward.register_fake
def _(grad: Tensor, hidden: Tensor, lora_B: Tensor, *others: Any) -> list[Tensor]:
    return fake_gradients((hidden, lora_B), others[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, hidden, lora_B, *ctx.settings = inputs
    ctx.save_for_backward(hidden, lora_B)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[1:3])
    gradients = _lora_up_backward(grad, *ctx.saved_tensors, *ctx.settings, wanted)
    dh, dB = none_for_empty(gradients, wanted)
    return grad, dh, dB, None, None


lora_up_operator.register_autograd(_differentiate, setup_context=_save)
