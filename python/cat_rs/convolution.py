"""Frozen convolutions as one matrix product, where that is faster."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cat_rs import operators
from cat_rs._native import _core

__all__ = ["FrozenConv2d", "patch_frozen_convolutions", "unpatch_frozen_convolutions"]

# What a convolution library spends on the layout of the weight grows with the weight; what the product spends more
# than it grows with the positions. Measured on Stable Diffusion 1.5's layers: see benchmarks/frozen_conv2d.py.
MIN_WEIGHTS = 10_000_000
MAX_POSITIONS = 128


class FrozenConv2dFunction(torch.autograd.Function):
    """y = im2col(x) W^T + b with W and b frozen; saves nothing of the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.geometry = x.shape[-2:], (stride, padding, dilation)
        return _core.frozen_conv2d_forward(x, weight, bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _core.frozen_conv2d_backward(grad, weight, ctx.size, *ctx.geometry), None, None, None, None, None


class FrozenConv2d(torch.nn.Conv2d):
    """A frozen convolution; a layer becomes one by assignment of ``__class__``, so its state is unchanged.

    Call by call, it runs the matrix product where the output has at most ``MAX_POSITIONS`` positions and the weight is
    contiguous, in float32 on the CPU, and ``torch.nn.Conv2d``'s own forward everywhere else.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._runs_as_product(x):
            return super().forward(x)
        if torch.compiler.is_compiling():
            return operators.frozen_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return FrozenConv2dFunction.apply(x, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def _runs_as_product(self, x: torch.Tensor) -> bool:
        if x.dim() != 4 or not x.dtype == self.weight.dtype == torch.float32 or x.device.type != "cpu":
            return False
        positions = x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return (
            0 < positions <= MAX_POSITIONS
            and not trains
            # In another layout (channels_last) the product would copy the weight in every call.
            and self.weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
        )


def patch_frozen_convolutions(model: torch.nn.Module) -> list[str]:
    """Lets the model's large frozen convolutions run as matrix products on small inputs.

    Parameters, names and the state dict are unchanged, and so are results up to rounding.

    Args:
        model: Any module; layers that are not plain, ungrouped, zero-padded ``torch.nn.Conv2d`` stay as they are.

    Returns:
        The names of the layers.
    """
    names = []
    for name, layer in model.named_modules():
        if (
            type(layer) in (torch.nn.Conv2d, FrozenConv2d)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and layer.weight.numel() >= MIN_WEIGHTS
            and not layer.weight.requires_grad
        ):
            layer.__class__ = FrozenConv2d
            names.append(name)
    return names


def unpatch_frozen_convolutions(model: torch.nn.Module) -> None:
    """Gives the layers PyTorch's own forward back."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, FrozenConv2d)]
    for layer in layers:
        layer.__class__ = torch.nn.Conv2d
