"""A frozen convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from cat_rs.arguments import shown
from cat_rs.composed.checks import Checks, undisturbed

__all__ = ["frozen_conv2d_backward", "frozen_conv2d_forward"]


@undisturbed
def frozen_conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See `cat_rs.ops.frozen_conv2d.frozen_conv2d`."""
    checks, geometry = _check("x", x, weight, bias, stride, padding, dilation)
    if bias is not None:
        checks.shape("bias", bias, weight.shape[:1])
    size = _output_size(checks, x.shape[2:], weight, geometry) if x.dim() == 4 else [0]
    if x.dim() != 4 or len(x) < 1 or x.shape[1] != weight.shape[1] or min(size) < 1:
        checks.refuse_shape("x", f"[B, {weight.shape[1]}, H, W] with room for the kernel", x)
    return F.conv2d(x, weight, bias, *geometry)


@undisturbed
def frozen_conv2d_backward(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """dL/dx of `frozen_conv2d_forward`, for an input of that height and width."""
    size = _pair("size", size)
    checks, geometry = _check("grad", grad, weight, None, stride, padding, dilation)
    if min(size) < 1:
        checks.refuse("size", "two integers >= 1", list(size))
    batch = grad.shape[0] if grad.dim() else 0
    checks.shape("grad", grad, [batch, len(weight), *_output_size(checks, size, weight, geometry)])
    return conv2d_input([batch, weight.shape[1], *size], weight, grad, *geometry)


def _output_size(checks: Checks, size: Sequence[int], weight: Tensor, geometry: Sequence[Sequence[int]]) -> list[int]:
    """The output's height and width."""
    stride, padding, dilation = geometry
    lengths = []
    for length, kernel, step, pad, gap in zip(size, weight.shape[2:], stride, padding, dilation, strict=True):
        lengths.append((length + 2 * pad - gap * (kernel - 1) - 1) // step + 1)
        if max(length + 2 * pad, gap * (kernel - 1) + 1) >= 2**63:
            got = f"{list(padding)} beside a dilation of {list(dilation)}"
            checks.refuse("padding", "small enough for sizes below 2^63", got)
    return lengths


def _check(
    argument: str, tensor: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Sequence[int]
) -> tuple[Checks, tuple[Any, ...]]:
    """Checks dtypes, weight and geometry; returns the stride, the padding and the dilation."""
    checks = Checks("frozen_conv2d")
    names = ("stride", "padding", "dilation")
    pairs = tuple(_pair(name, values) for name, values in zip(names, geometry, strict=True))
    dtype = checks.floats(argument, tensor).dtype
    for name, own in (("weight", weight), ("bias", bias)):
        if own is not None:
            checks.beside(name, own, argument, dtype, "the dtype of the input")
    if weight.dim() != 4 or 0 in weight.shape:
        checks.refuse_shape("weight", "[out, in, kh, kw] with no empty dimension", weight)
    for name, values, least in zip(names, pairs, (1, 0, 1), strict=True):
        if min(values) < least:
            checks.refuse(name, f"two integers >= {least}", list(values))
    return checks, pairs


def _pair(argument: str, values: Sequence[int]) -> Sequence[int]:
    try:
        first, second = (int(value.__index__()) for value in values)
    except (TypeError, ValueError, AttributeError):
        first = second = 2**63
    if not (-(2**63) <= first < 2**63 and -(2**63) <= second < 2**63):
        expected = "two integers in -2**63..2**63 - 1"
        raise TypeError(f"argument '{argument}': must be {expected}, got {shown(values)}")
    return first, second
