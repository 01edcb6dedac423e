"""The operations as operators of the PyTorch dispatcher, ``torch.ops.cat_rs``: for torch.compile and torch.export.

In eager mode ``cat_rs.functional`` calls the kernels through ``torch.autograd.Function``, which costs less per call.
An operator neither writes to an argument nor returns one, so some copy what the eager function works on in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cat_rs._native import _core, stream_of

__all__ = ["cat_loss", "frozen_conv2d", "lora_linear", "lora_up", "noising"]


def _given(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Operators return tensors only: what was not asked for is empty."""
    return [
        tensor.new_empty(0) if gradient is None else gradient for gradient, tensor in zip(gradients, like, strict=True)
    ]


def _fakes(like: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """What `_given` returns, without values; gradients are contiguous."""
    return [
        tensor.new_empty(tensor.shape) if want else tensor.new_empty(0)
        for tensor, want in zip(like, wanted, strict=True)
    ]


def _only(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


@torch.library.custom_op("cat_rs::cat_loss", mutates_args=())
def cat_loss(
    model_pred: Tensor,
    target: Tensor,
    model_pred_no_trigger: Tensor,
    base_pred: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    cat_factor: float,
    mask_normalize: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`cat_rs.cat_loss`. Returns the total and [diffusion, cat]."""
    total, parts, _, _ = _core.cat_loss(
        model_pred,
        target,
        model_pred_no_trigger,
        base_pred,
        sample_weight,
        mask,
        cat_factor,
        mask_normalize,
        1.0,
        (False, False),
        stream_of(model_pred),
    )
    return total, parts if isinstance(parts, Tensor) else total.new_tensor(parts)


@cat_loss.register_fake
def _(
    model_pred: Tensor,
    target: Tensor,
    model_pred_no_trigger: Tensor,
    base_pred: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    cat_factor: float,
    mask_normalize: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (model_pred, target, model_pred_no_trigger, base_pred)
    wide = any(tensor.dtype == torch.float64 for tensor in inputs)
    dtype = torch.float64 if wide else torch.float32
    return model_pred.new_empty((), dtype=dtype), model_pred.new_empty(2, dtype=dtype)


@torch.library.custom_op("cat_rs::cat_loss_backward", mutates_args=())
def _cat_loss_backward(
    grad_total: Tensor,
    model_pred: Tensor,
    target: Tensor,
    model_pred_no_trigger: Tensor,
    base_pred: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    cat_factor: float,
    mask_normalize: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    _, _, *gradients = _core.cat_loss(
        model_pred,
        target,
        model_pred_no_trigger,
        base_pred,
        sample_weight,
        mask,
        cat_factor,
        mask_normalize,
        grad_total if grad_total.is_cuda else grad_total.item(),
        (wanted[0], wanted[1]),
        stream_of(model_pred),
    )
    first, second = _given(gradients, (model_pred, model_pred_no_trigger))
    # Both lie in one buffer, which the outputs of an operator must not.
    return first, second.clone()


@_cat_loss_backward.register_fake
def _(
    grad_total: Tensor,
    model_pred: Tensor,
    target: Tensor,
    model_pred_no_trigger: Tensor,
    base_pred: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    cat_factor: float,
    mask_normalize: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    first, second = _fakes((model_pred, model_pred_no_trigger), wanted)
    return first, second


def _save_cat_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.cat_factor, ctx.mask_normalize = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_cat_loss(ctx: Any, grad_total: Tensor, grad_parts: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    gradients = _cat_loss_backward(grad_total, *ctx.saved_tensors, ctx.cat_factor, ctx.mask_normalize, wanted)
    first, second = _only(gradients, wanted)
    return first, None, second, None, None, None, None, None


cat_loss.register_autograd(_differentiate_cat_loss, setup_context=_save_cat_loss)


@torch.library.custom_op("cat_rs::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """See :func:`cat_rs.lora_linear`. Returns y and scaling * x A^T, [M, r]."""
    return _core.lora_linear_forward(x, weight, bias, lora_A, lora_B, scaling)


@lora_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _core.lora_linear_backward(
        grad, x, weight, lora_A, lora_B, hidden, scaling, (wanted[0], wanted[1], wanted[2])
    )
    dx, dA, dB = _given(gradients, (x, lora_A, lora_B))
    return dx, dA, dB


@_lora_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    hidden: Tensor,
    scaling: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dA, dB = _fakes((x, lora_A, lora_B), wanted)
    return dx, dA, dB


def _save_lora_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, ctx.scaling = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1])


def _differentiate_lora_linear(ctx: Any, grad: Tensor, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[3], needs[4]]
    dx, dA, dB = _only(_lora_linear_backward(grad, *ctx.saved_tensors, ctx.scaling, wanted), wanted)
    return dx, None, grad.reshape(-1, grad.shape[-1]).sum(0) if needs[2] else None, dA, dB, None


lora_linear.register_autograd(_differentiate_lora_linear, setup_context=_save_lora_linear)


@torch.library.custom_op("cat_rs::lora_up", mutates_args=())
def lora_up(y: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float, channels_second: bool) -> Tensor:
    """See :func:`cat_rs.functional.lora_up_`. Returns y + scaling * B h."""
    out = y.clone()
    _core.lora_up_forward(out, hidden, lora_B, scaling, channels_second)
    return out


@lora_up.register_fake
def _(y: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float, channels_second: bool) -> Tensor:
    return torch.empty_like(y)


@torch.library.custom_op("cat_rs::lora_up_backward", mutates_args=())
def _lora_up_backward(
    grad: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float, channels_second: bool, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    gradients = _core.lora_up_backward(grad, hidden, lora_B, scaling, channels_second, (wanted[0], wanted[1]))
    dh, dB = _given(gradients, (hidden, lora_B))
    return dh.contiguous(), dB


@_lora_up_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, lora_B: Tensor, scaling: float, channels_second: bool, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dh, dB = _fakes((hidden, lora_B), wanted)
    return dh, dB


def _save_lora_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, hidden, lora_B, ctx.scaling, ctx.channels_second = inputs
    ctx.save_for_backward(hidden, lora_B)


def _differentiate_lora_up(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[1:3])
    gradients = _lora_up_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.channels_second, wanted)
    dh, dB = _only(gradients, wanted)
    return grad, dh, dB, None, None


lora_up.register_autograd(_differentiate_lora_up, setup_context=_save_lora_up)


@torch.library.custom_op("cat_rs::noising", mutates_args=())
def noising(
    latents: Tensor, noise: Tensor, signal_rate: Tensor, noise_rate: Tensor, prediction_type: str, copies: int
) -> tuple[Tensor, Tensor]:
    """See :func:`cat_rs.functional.noising`."""
    stream = stream_of(latents)
    noisy, target = _core.noising(latents, noise, signal_rate, noise_rate, prediction_type, copies, stream)
    return noisy, target.clone() if target is noise else target


@noising.register_fake
def _(
    latents: Tensor, noise: Tensor, signal_rate: Tensor, noise_rate: Tensor, prediction_type: str, copies: int
) -> tuple[Tensor, Tensor]:
    return latents.new_empty((copies * latents.shape[0], *latents.shape[1:])), noise.new_empty(noise.shape)


@torch.library.custom_op("cat_rs::frozen_conv2d", mutates_args=())
def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :mod:`cat_rs.frozen`."""
    return _core.frozen_conv2d_forward(x, weight, bias, stride, padding, dilation).contiguous()


@frozen_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    geometry = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    size = [(length + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for length, kernel, step, pad, gap in geometry]
    return x.new_empty((x.shape[0], weight.shape[0], *size))


@torch.library.custom_op("cat_rs::frozen_conv2d_backward", mutates_args=())
def _frozen_conv2d_backward(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return _core.frozen_conv2d_backward(grad, weight, size, stride, padding, dilation).contiguous()


@_frozen_conv2d_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1], *size))


def _save_frozen_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.geometry = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(weight)


def _differentiate_frozen_conv2d(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return _frozen_conv2d_backward(grad, weight, ctx.size, *ctx.geometry), None, None, None, None, None


frozen_conv2d.register_autograd(_differentiate_frozen_conv2d, setup_context=_save_frozen_conv2d)
