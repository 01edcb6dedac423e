"""Frozen layers as matrix products of this package's own, where these are faster than PyTorch's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from cat_rs import operators
from cat_rs._native import _core

__all__ = [
    "FrozenConv2d",
    "FrozenLayers",
    "FrozenLinear",
    "frozen_linear",
    "most_positions",
    "patch_frozen",
    "unpatch_frozen",
]

# Products of fewer multiplications are over before the call is.
MIN_MULTIPLICATIONS = 1_000_000

OWN_PRODUCTS = _core.build_info()["matmul"] == "cat-rs"
"""Whether float32 products run faster than those of PyTorch's library on this processor."""


def most_positions(weights: int) -> int:
    """On how many positions of its output a convolution of so many weights still runs faster as a matrix product.

    What a convolution library spends on the layout of the weight grows with the weight; what the product spends more
    than it grows with the positions. Measured on Stable Diffusion 1.5's layers: see benchmarks/frozen_conv2d.py.
    """
    if OWN_PRODUCTS:
        return min(weights // 50_000, 256) if weights >= 3_500_000 else 0
    return 128 if weights >= 10_000_000 else 0


class FrozenLayers(NamedTuple):
    """Names of layers by what they run.

    Attributes:
        linear: Linear layers with products of this package's own.
        convolutions: Convolutions that run as a matrix product on small inputs.
    """

    linear: list[str]
    convolutions: list[str]


class FrozenLinearFunction(torch.autograd.Function):
    """y = x W^T + b with W and b frozen; saves nothing of the input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _core.frozen_linear_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: an operation that can be differentiated again
            return grad @ weight, None, None
        return _core.frozen_linear_backward(grad, weight), None, None


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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
    return _core.frozen_linear_forward(x, weight, bias)


def _runs_own_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        OWN_PRODUCTS
        and not torch.compiler.is_compiling()
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.shape[0] >= MIN_MULTIPLICATIONS
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )


class FrozenLinear(torch.nn.Linear):
    """A frozen linear layer; a layer becomes one by assignment of ``__class__``, so its state is unchanged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x, self.weight, self.bias)


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

    Call by call, it runs the matrix product where the output has few positions (:func:`most_positions`) and the weight
    is contiguous, in float32 on the CPU, and ``torch.nn.Conv2d``'s own forward everywhere else.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.runs_as_product(x):
            return super().forward(x)
        if torch.compiler.is_compiling():
            return operators.frozen_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return FrozenConv2dFunction.apply(x, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def runs_as_product(self, x: torch.Tensor) -> bool:
        """Whether a call with this input does."""
        if x.dim() != 4 or not x.dtype == self.weight.dtype == torch.float32 or x.device.type != "cpu":
            return False
        positions = x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return (
            0 < positions <= most_positions(self.weight.numel())
            and not trains
            # In another layout (channels_last) the product would copy the weight in every call.
            and self.weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
        )


def patch_frozen(model: torch.nn.Module) -> FrozenLayers:
    """Lets the model's frozen linear layers, and its large frozen convolutions on small inputs, run as own products.

    Parameters, names and the state dict are unchanged, and so are results up to rounding. Layers that are not plain
    ``torch.nn.Linear`` or plain, ungrouped, zero-padded ``torch.nn.Conv2d`` stay as they are, and so do linear layers
    where PyTorch's products are as fast.

    Args:
        model: Any module.

    Returns:
        The names of the layers.
    """
    found = FrozenLayers([], [])
    for name, layer in model.named_modules():
        if type(layer) in (torch.nn.Linear, FrozenLinear):
            if OWN_PRODUCTS and not layer.weight.requires_grad:
                layer.__class__ = FrozenLinear
                found.linear.append(name)
        elif (
            type(layer) in (torch.nn.Conv2d, FrozenConv2d)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and most_positions(layer.weight.numel()) > 0
            and not layer.weight.requires_grad
        ):
            layer.__class__ = FrozenConv2d
            found.convolutions.append(name)
    return found


def unpatch_frozen(model: torch.nn.Module) -> None:
    """Gives the layers PyTorch's own forward back."""
    modules: list[Any] = list(model.modules())
    own: dict[type[Any], type[Any]] = {FrozenLinear: torch.nn.Linear, FrozenConv2d: torch.nn.Conv2d}
    for module in modules:
        module.__class__ = own.get(type(module), type(module))
