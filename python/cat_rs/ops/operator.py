"""What operations share.

In eager mode an operation calls its kernels through ``torch.autograd.Function``, which costs less per call than an
operator of the PyTorch dispatcher; under torch.compile and torch.export it calls the operator
``torch.ops.cat_rs.<operation>``. An operator neither writes to an argument nor returns one, so some copy what the
eager function works on in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from cat_rs._native import KERNEL_DEVICES, WHY_COMPOSED, _core
from cat_rs.errors import CatRsError, InvalidValueError

__all__ = [
    "KERNEL_DEVICES",
    "LOW_PRECISION",
    "OWN_MATMUL_IS_FASTER",
    "empty_for_none",
    "fake_gradients",
    "none_for_empty",
    "reraise",
    "rounded",
    "stream_of",
]

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""The dtypes in which a layer computes with float32 weights rounded to them."""

OWN_MATMUL_IS_FASTER = WHY_COMPOSED is None and _core.build_info()["matmul"] == "cat-rs"
"""Whether this package's float32 products run faster than those of PyTorch's library on this processor."""


def reraise(op: str, error: RuntimeError, **tensors: Any) -> NoReturn:
    """Raises an error of PyTorch's autograd again: as one that names the tensor at fault, where there is one.

    To look at the tensors beforehand would cost every call.
    """
    if not isinstance(error, CatRsError):
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                continue
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                got = "one of torch.func (vmap, grad, jvp ...): call it outside"
                raise InvalidValueError(f"{op}: `{name}` must be a plain tensor, got {got}") from error
            if tensor.is_inference():
                got = "an inference tensor: clone it"
                raise InvalidValueError(f"{op}: `{name}` must be usable for a gradient, got {got}") from error
    raise error


def stream_of(tensor: Tensor | None) -> int:
    """The handle of PyTorch's current stream on the tensor's device, where kernels for CUDA go; 0 elsewhere."""
    # None where the dispatcher was given it for a tensor: the kernel refuses it.
    if tensor is None or not tensor.is_cuda or torch.version.hip is not None:
        return 0
    return torch.cuda.current_stream(tensor.device).cuda_stream


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 weight in the lower dtype that its layer computes in; any other is left to the operation's checks."""
    return weight.to(dtype) if weight.dtype == torch.float32 and dtype in LOW_PRECISION else weight


def empty_for_none(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients as an operator returns them: tensors only, so that what was not asked for is empty."""
    return [
        tensor.new_empty(0) if gradient is None else gradient for gradient, tensor in zip(gradients, like, strict=True)
    ]


def fake_gradients(like: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """What :func:`empty_for_none` returns, without values; gradients are contiguous."""
    return [tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip(like, wanted, strict=True)]


def none_for_empty(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that an operator returned, as autograd takes them."""
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
