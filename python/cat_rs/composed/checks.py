"""What an operation refuses, in the words of the extension."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from cat_rs.arguments import check_memory, shown
from cat_rs.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, LayoutError, ShapeError

__all__ = ["Checks", "dtype_name", "integer", "number", "text", "undisturbed"]

Function = TypeVar("Function", bound=Callable[..., Any])
_TENSOR_DISPATCH = Tensor.__torch_dispatch__


def undisturbed(function: Function) -> Function:
    """Runs a function of tensors outside of autograd and of autocast, as the extension's functions run."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            devices = {value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
            for device in devices:
                if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                    with torch.autocast(device, enabled=False):
                        return function(*args, **kwargs)
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


class Checks:
    """The checks of one call: its tensors are plain, dense and on the device of the first one."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.device: torch.device | None = None

    def dense(self, argument: str, tensor: object) -> Tensor:
        """Refuses what is no plain, dense tensor on the call's device."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"argument '{argument}': expected a torch.Tensor, got {type(tensor)}")
        kind = type(tensor)
        if kind.__torch_dispatch__ is not _TENSOR_DISPATCH and kind is not torch.nn.Parameter:
            name = f"{kind.__module__}.{kind.__qualname__}"
            raise TypeError(f"argument '{argument}': must be a plain torch.Tensor, got a {name}")
        if self.device is None:
            if tensor.is_meta:
                self._refuse_device(argument, "the CPU or on an accelerator", tensor)
            self.device = tensor.device
        elif tensor.device != self.device:
            self._refuse_device(argument, _device_name(self.device), tensor)
        if tensor.layout != torch.strided or tensor.is_nested:
            raise LayoutError(f"{self.op}: `{argument}` must be a dense tensor, got a sparse or opaque one")
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            expected, got = "a tensor with memory of its own", "a wrapper around one (of torch.func?)"
            raise LayoutError(f"{self.op}: `{argument}` must be {expected}, got {got}")
        if tensor.is_neg():
            got = "a lazily negated view (call .resolve_neg())"
            raise LayoutError(f"{self.op}: `{argument}` must be a plain tensor, got {got}")
        check_memory(self.op, argument, tensor)
        return tensor

    def _refuse_device(self, argument: str, expected: str, tensor: Tensor) -> None:
        got = f"a tensor on {_device_name(tensor.device)}"
        raise DeviceError(f"{self.op}: `{argument}` must be on {expected}, got {got}")

    def dtype(self, argument: str, tensor: object, allowed: Sequence[torch.dtype], expected: str) -> Tensor:
        """As `dense`, and refuses other dtypes."""
        checked = self.dense(argument, tensor)
        if checked.dtype not in allowed:
            got = dtype_name(checked.dtype)
            raise DtypeError(f"{self.op}: `{argument}` must have dtype {expected}, got {got}")
        return checked

    def floats(self, argument: str, tensor: object) -> Tensor:
        """As `dense`, and refuses what has no float dtype."""
        return self.dtype(argument, tensor, FLOAT_DTYPES, FLOAT_NAMES)

    def beside(self, argument: str, tensor: object, first: str, dtype: torch.dtype, expected: str) -> Tensor:
        """As `floats`, and refuses another dtype than that of the argument `first`."""
        checked = self.floats(argument, tensor)
        if checked.dtype != dtype:
            got = f"{dtype_name(checked.dtype)} beside {first} of {dtype_name(dtype)}"
            raise DtypeError(f"{self.op}: `{argument}` must have dtype {expected}, got {got}")
        return checked

    def shape(self, argument: str, tensor: Tensor, expected: Sequence[int]) -> None:
        """Refuses another shape."""
        if tuple(tensor.shape) != tuple(expected):
            self.refuse_shape(argument, str(list(expected)), tensor)

    def refuse_shape(self, argument: str, expected: str, tensor: Tensor) -> None:
        """Raises what `shape` raises."""
        raise ShapeError(f"{self.op}: `{argument}` must have shape {expected}, got {list(tensor.shape)}")

    def constant(self, argument: str, tensor: Tensor) -> None:
        """Refuses a tensor to which a gradient would have to flow."""
        if tensor.requires_grad:
            got = "a tensor with requires_grad=True: detach it"
            self.refuse(argument, "a constant (no gradient flows into it)", got)

    def contiguous(self, argument: str, tensor: Tensor) -> None:
        """Refuses a tensor whose elements do not lie one after the other."""
        if not tensor.is_contiguous():
            got = f"strides {list(tensor.stride())}"
            raise LayoutError(f"{self.op}: `{argument}` must be contiguous, got {got}")

    def finite(self, argument: str, value: object) -> float:
        """Refuses what is no finite number."""
        checked = number(argument, value)
        if not abs(checked) < torch.inf:
            self.refuse(argument, "a finite number", checked)
        return checked

    def refuse(self, argument: str, expected: str, got: object) -> None:
        """Raises the error of a value outside its domain."""
        raise InvalidValueError(f"{self.op}: `{argument}` must be {expected}, got {got}")


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name of a dtype, without the package."""
    return str(dtype).removeprefix("torch.")


def number(argument: str, value: Any) -> float:
    """The value as a float."""
    try:
        return value if type(value) is float else float(value.__float__())
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"argument '{argument}': must be a number, got {shown(value)}") from None


def integer(argument: str, value: Any, low: int, high: int, bits: str) -> int:
    """The value as an integer in low..high, which ``bits`` says."""
    try:
        converted = int(value.__index__())
    except (AttributeError, TypeError):
        converted = high + 1
    if not low <= converted <= high:
        raise TypeError(f"argument '{argument}': must be an integer in {bits}, got {shown(value)}")
    return converted


def text(argument: str, value: Any) -> str:
    """The value as a text."""
    if not isinstance(value, str):
        raise TypeError(f"argument '{argument}': must be a text without surrogates, got {shown(value)}")
    return value


def _device_name(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else str(device)
