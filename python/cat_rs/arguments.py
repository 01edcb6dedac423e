"""Checks of arguments: a refusal names the operation, the argument, what was expected and what came."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch

from cat_rs.errors import CatRsError, DtypeError, InvalidValueError, LayoutError

__all__ = [
    "ABOUT_VALUES",
    "as_float",
    "check",
    "check_memory",
    "check_module",
    "check_no_mode",
    "check_path",
    "check_plain",
    "check_tensor",
    "refusing",
    "shown",
]

# What Python and PyTorch raise about a value that is none of what they can use.
ABOUT_VALUES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError)
_LONGEST = 60
_FEW = 4


def shown(value: object) -> str:
    """A short text for a value; only the type of what may be of any size, or whose own text may fail."""
    few = isinstance(value, tuple | list) and len(value) <= _FEW and all(type(item) in (int, float) for item in value)
    if not few and type(value) in (tuple, list, dict, set):
        return f"a {type(value).__name__} of length {len(value)}"  # type: ignore[arg-type]
    if isinstance(value, PurePath):
        value = str(value)
    if not (few or value is None or isinstance(value, numbers.Number | str | torch.dtype | torch.device)):
        return f"a {type(value).__name__}"
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 2 :]}"


def check(op: str, argument: str, value: Any, expected: str, holds: Callable[[Any], Any]) -> None:
    """Refuses a value of which ``holds`` is false, or cannot be told because it has another type."""
    check_memory(op, argument, value)
    try:
        if holds(value):
            return
    except ABOUT_VALUES:
        pass
    raise InvalidValueError(f"{op}: `{argument}` must be {expected}, got {shown(value)}")


def check_module(op: str, argument: str, value: object) -> None:
    """Refuses what is no module."""
    check(op, argument, value, "a torch.nn.Module", lambda value: isinstance(value, torch.nn.Module))


def check_path(op: str, argument: str, value: Any) -> None:
    """Refuses what names no file: another type, or a text that the file system has no bytes for."""
    with refusing(op, argument, "a path", value):
        if b"\0" in os.fsencode(Path(value)):
            raise ValueError("a zero byte ends a path")


def check_tensor(op: str, argument: str, value: object) -> None:
    """Refuses what is no tensor, for arguments whose dtype or device an operation looks at before its kernel does."""
    if not isinstance(value, torch.Tensor):
        raise DtypeError(f"{op}: `{argument}` must be a torch.Tensor, got {type(value).__name__}")


def check_no_mode(op: str) -> None:
    """Refuses to make tensors, which are to have memory, in a mode that only looks at shapes."""
    made = torch.empty(0)
    if type(made) is not torch.Tensor or made.is_meta:
        got = type(made).__name__ if type(made) is not torch.Tensor else "torch.device('meta')"
        raise LayoutError(f"{op}: must be called outside of FakeTensorMode and torch.device('meta'), got {got}")


def check_plain(op: str, argument: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor that computes in its own way: fake, sharded, nested, sparse, or one of torch.func."""
    got = None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        got = "one of torch.func (vmap, grad, jvp ...): call it outside"
    elif type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        got = f"a {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.is_nested:
        got = f"one of layout {tensor.layout}"
    if got is not None:
        raise LayoutError(f"{op}: `{argument}` must be a plain dense tensor, got {got}")
    check_memory(op, argument, tensor)


def check_memory(op: str, argument: str, value: object) -> None:
    """Refuses a tensor whose storage was freed, as FSDP frees that of parameters: PyTorch does not survive reading it.

    Nor does it survive some views of quantized tensors. For operations that are PyTorch's own; this package's kernels
    check what they read. A tensor of torch.func that outlived its transformation is refused too. The value may be a
    tensor, lists and tuples of them, or anything else, which is let through.
    """
    pending, seen = [value], {id(value)}  # of lists that may be deep, or hold themselves
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            _check_memory(op, argument, item)
        elif isinstance(item, list | tuple):
            pending += [each for each in item if id(each) not in seen]
            seen.update(map(id, item))


def _check_memory(op: str, argument: str, tensor: torch.Tensor) -> None:
    functorch = torch._C._functorch
    if functorch.maybe_current_level() is None and functorch.is_functorch_wrapped_tensor(tensor):
        raise LayoutError(f"{op}: `{argument}` must be a plain tensor, got one that outlived its torch.func call")
    if tensor.is_quantized:  # a byte view or a negative view of one ends the process where it is read
        raise LayoutError(f"{op}: `{argument}` must be a plain tensor, got a quantized one")
    while torch._is_functional_tensor(tensor):  # as torch.compile wraps those that it traces
        tensor = torch._from_functional_tensor(tensor)
    try:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + extent) * tensor.element_size() if tensor.numel() else 0
        memory = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # sparse, nested and wrapped tensors have no storage of their own
        return
    if memory < needed:
        raise LayoutError(f"{op}: `{argument}` must have {needed} bytes of memory, got a tensor with {memory}")


def as_float(op: str, argument: str, value: Any) -> float:
    """The value as a float."""
    check_memory(op, argument, value)
    with refusing(op, argument, "a number", value):
        return float(value)


@contextmanager
def refusing(op: str, argument: str, expected: str, value: object) -> Iterator[None]:
    """Turns what goes wrong with a value of another type, shape or content within the context into a refusal of it."""
    try:
        yield
    except (CatRsError, torch.OutOfMemoryError):
        raise
    except ABOUT_VALUES as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise InvalidValueError(f"{op}: `{argument}` must be {expected}, got {shown(value)} ({reason})") from error
