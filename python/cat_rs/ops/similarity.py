"""Similarities of embeddings."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

from cat_rs._native import core_of
from cat_rs.arguments import check_memory, refusing
from cat_rs.errors import DtypeError
from cat_rs.ops.operator import stream_of

__all__ = ["Array", "cross_similarity", "similarity"]

Array = TypeVar("Array", torch.Tensor, np.ndarray)


def similarity(a: Array, b: Array) -> Array:
    """s(a_i, b_i) = (1 + cos(a_i, b_i)) / 2, in [0, 1], in one pass over both.

    The mapping to [0, 1] is that of the CAT authors' evaluation code. Embeddings are read where they are, whatever
    their strides; only a numpy array with negative strides is copied.

    Args:
        a: Embeddings, [N, D]; torch (float32, float64, bfloat16, float16, on the CPU or on CUDA) or numpy. On CUDA the
            call waits for the values.
        b: Embeddings of the same shape.

    Returns:
        [N], float32, or float64 if an input is; numpy if both inputs are.

    Raises:
        ShapeError, DtypeError, DeviceError: Naming the argument, what was expected and what came.
        InvalidValueError: A row is zero or not finite; the message names it.
    """
    first = _tensor("a", a)
    return _like(core_of(first).paired_similarity(first, _tensor("b", b), stream_of(first)), a, b)


def cross_similarity(a: Array, b: Array, reduce: str = "mean") -> Array:
    """The mean or maximum over j of s(a_i, b_j), for each row of ``a``; no N x M matrix is formed.

    Args:
        a: Embeddings, [N, D]; torch or numpy.
        b: Embeddings, [M, D].
        reduce: "mean" or "max".

    Returns:
        [N], float32, or float64 if an input is; numpy if both inputs are.

    Raises:
        DeviceError, DtypeError, InvalidValueError, ShapeError: As :func:`similarity`.
    """
    first = _tensor("a", a)
    return _like(core_of(first).cross_similarity(first, _tensor("b", b), reduce, stream_of(first)), a, b)


def _tensor(argument: str, array: torch.Tensor | np.ndarray) -> torch.Tensor:
    if not isinstance(array, torch.Tensor | np.ndarray):
        got = type(array).__name__
        raise DtypeError(f"similarity: `{argument}` must be a torch.Tensor or a numpy.ndarray, got {got}")
    check_memory("similarity", argument, array)
    with refusing("similarity", argument, "an array of floats", array):
        return torch.from_numpy(_viewable(array)) if isinstance(array, np.ndarray) else array.detach()


def _viewable(array: np.ndarray) -> np.ndarray:
    """The array, or another at the same memory, that PyTorch can view; a copy where its strides rule that out."""
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    return array if array.flags.writeable else np.asarray(_Writable(array))


class _Writable:
    """A read-only array said to be writable: PyTorch warns of the others, also where it only reads."""

    def __init__(self, array: np.ndarray) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        # Whose memory it is.
        self.array = array


def _like(result: torch.Tensor, *inputs: torch.Tensor | np.ndarray) -> Any:
    return result.numpy() if all(isinstance(array, np.ndarray) for array in inputs) else result
