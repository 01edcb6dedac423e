"""A frozen convolution as one matrix product, which is faster than PyTorch's on small inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat_rs._native import WHY_COMPOSED, core_of
from cat_rs.ops.operator import OWN_MATMUL_IS_FASTER

__all__ = ["FrozenConv2dFunction", "frozen_conv2d", "max_output_positions"]


def max_output_positions(weights: int) -> int:
    """On how many positions of its output a convolution of so many weights still runs faster as a matrix product.

    What a convolution library spends on the layout of the weight grows with the weight; what the product spends more
    than it grows with the positions. Measured on Stable Diffusion 1.5's layers: see benchmarks/frozen_conv2d.py.
    """
    if WHY_COMPOSED is not None:
        return 0
    if OWN_MATMUL_IS_FASTER:
        return min(weights // 50_000, 256) if weights >= 3_500_000 else 0
    return 128 if weights >= 10_000_000 else 0


class FrozenConv2dFunction(torch.autograd.Function):
    """y = im2col(x) W^T + b with W and b frozen; saves nothing of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.geometry = x.shape[-2:], geometry
        return core_of(x).frozen_conv2d_forward(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return (
            core_of(grad).frozen_conv2d_backward(grad, weight, ctx.size, *ctx.geometry),
            None,
            None,
            None,
            None,
            None,
        )


def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``torch.nn.functional.conv2d`` for a frozen weight and bias, as y = im2col(x) W^T + b.

    Args:
        x: [B, in, H, W], on the CPU; float32, float64, bfloat16 or float16.
        weight: W, [out, in, kh, kw], in x's dtype.
        bias: b, [out], or None.
        stride: Height, width; and so the others.
        padding: Of zeros.
        dilation: Steps between the kernel's elements.

    Returns:
        y, [B, out, H', W'], which in eager mode is a view of a matrix, with its channels last.

    Raises:
        ShapeError, DtypeError, DeviceError, InvalidValueError: Naming the argument, what was expected and what came.
    """
    function = frozen_conv2d_operator if torch.compiler.is_compiling() else FrozenConv2dFunction.apply
    return function(x, weight, bias, stride, padding, dilation)


@torch.library.custom_op("cat_rs::frozen_conv2d", mutates_args=())
def frozen_conv2d_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :func:`frozen_conv2d`."""
    return core_of(x).frozen_conv2d_forward(x, weight, bias, stride, padding, dilation).contiguous()


@frozen_conv2d_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Sequence[int]) -> Tensor:
    sides = zip(x.shape[2:], weight.shape[2:], *geometry, strict=True)
    size = [(length + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for length, kernel, step, pad, gap in sides]
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
    return core_of(grad).frozen_conv2d_backward(grad, weight, size, stride, padding, dilation).contiguous()


@_frozen_conv2d_backward.register_fake
def _(grad: Tensor, weight: Tensor, size: Sequence[int], *geometry: Sequence[int]) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1], *size))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.geometry = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return _frozen_conv2d_backward(grad, weight, ctx.size, *ctx.geometry), None, None, None, None, None


frozen_conv2d_operator.register_autograd(_differentiate, setup_context=_save)
