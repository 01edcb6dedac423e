"""Frozen layers that run as matrix products of this package's own, where these are faster than PyTorch's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cat_rs.ops.frozen_conv2d import frozen_conv2d, max_output_positions
from cat_rs.ops.frozen_linear import frozen_linear
from cat_rs.ops.operator import OWN_MATMUL_IS_FASTER

__all__ = ["FrozenConv2d", "FrozenLayers", "FrozenLinear", "patch_frozen", "unpatch_frozen"]


class FrozenLayers(NamedTuple):
    """Names of layers by what they run.

    Attributes:
        linear: Linear layers with products of this package's own.
        convolutions: Convolutions that run as a matrix product on small inputs.
    """

    linear: list[str]
    convolutions: list[str]


class FrozenLinear(torch.nn.Linear):
    """A frozen linear layer; a layer becomes one by assignment of ``__class__``, so its state is unchanged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x, self.weight, self.bias)


class FrozenConv2d(torch.nn.Conv2d):
    """A frozen convolution; a layer becomes one by assignment of ``__class__``, so its state is unchanged.

    Call by call, it runs the matrix product where the output has few positions (:func:`max_output_positions`) and the
    weight is contiguous, in float32 on the CPU, and ``torch.nn.Conv2d``'s own forward everywhere else.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.runs_as_product(x):
            return super().forward(x)
        padding: Any = self.padding  # no string in a patched layer
        return frozen_conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation)

    def runs_as_product(self, x: torch.Tensor) -> bool:
        """Whether a call with this input does."""
        if x.dim() != 4 or not x.dtype == self.weight.dtype == torch.float32 or x.device.type != "cpu":
            return False
        positions = x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return (
            0 < positions <= max_output_positions(self.weight.numel())
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
            if OWN_MATMUL_IS_FASTER and not layer.weight.requires_grad:
                layer.__class__ = FrozenLinear
                found.linear.append(name)
        elif (
            type(layer) in (torch.nn.Conv2d, FrozenConv2d)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and max_output_positions(layer.weight.numel()) > 0
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
