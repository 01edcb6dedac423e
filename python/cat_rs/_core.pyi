"""The Rust extension. Shapes, dtypes and formulas are documented on the public functions of cat_rs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

__all__ = [
    "adamw_step",
    "adapter_layers",
    "adapter_tensors",
    "bootstrap_difference",
    "bootstrap_interval",
    "build_info",
    "cat_loss",
    "compile_kernels",
    "cross_similarity",
    "cuda_architectures",
    "cuda_versions",
    "frozen_conv2d_backward",
    "frozen_conv2d_forward",
    "frozen_linear_backward",
    "frozen_linear_forward",
    "harmonic_mean",
    "kps_difference",
    "lora_linear_backward",
    "lora_linear_forward",
    "lora_up_backward",
    "lora_up_forward",
    "names_that_fit",
    "noising",
    "paired_similarity",
    "read_safetensors",
    "scale_gradients",
    "student_loss",
    "sum_of_squares",
    "write_safetensors",
]

def cat_loss(
    model_pred: Tensor,
    target: Tensor,
    model_pred_no_trigger: Tensor,
    base_pred: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    preserve_weight: Tensor | None,
    preserve_mask: Tensor | None,
    cat_factor: float,
    mask_normalize: bool,
    scale: float | Tensor,
    wanted: tuple[bool, ...],
    stream: int = 0,
) -> tuple[Tensor, tuple[float, float] | Tensor, Tensor | None, Tensor | None]: ...
def scale_gradients(first: Tensor | None, second: Tensor | None, factor: Tensor, stream: int = 0) -> None: ...
def student_loss(
    student: Tensor,
    target: Tensor,
    base_pred: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    preserve_weight: Tensor | None,
    preserve_mask: Tensor | None,
    cat_factor: float | Tensor,
    scale: float | Tensor,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor]: ...
def noising(
    latents: Tensor,
    noise: Tensor,
    signal_rate: Tensor,
    noise_rate: Tensor,
    prediction_type: str,
    copies: int,
    stream: int = 0,
) -> tuple[Tensor, Tensor]: ...
def lora_linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]: ...
def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
def lora_up_forward(y: Tensor, hidden: Tensor, lora_b: Tensor, scaling: float, channels_second: bool) -> None: ...
def lora_up_backward(
    grad: Tensor, hidden: Tensor, lora_b: Tensor, scaling: float, channels_second: bool, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]: ...
def frozen_conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor: ...
def frozen_conv2d_backward(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor: ...
def frozen_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...
def frozen_linear_backward(grad: Tensor, weight: Tensor) -> Tensor: ...
def sum_of_squares(grad: Tensor, sums: Tensor, index: int, stream: int = 0) -> None: ...
def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low_precision: Tensor | None,
    *,
    settings: Tensor,
    sums: Tensor,
    step: Tensor,
    skipped: Tensor | None,
    stream: int = 0,
) -> None: ...
def paired_similarity(a: Tensor, b: Tensor, stream: int = 0) -> Tensor: ...
def cross_similarity(a: Tensor, b: Tensor, reduce: str, stream: int = 0) -> Tensor: ...

_Values = np.ndarray[Any, np.dtype[np.float64]]
_Clusters = np.ndarray[Any, np.dtype[np.int64]] | None

def harmonic_mean(values: _Values) -> float: ...
def bootstrap_interval(
    groups: Sequence[tuple[_Values, _Clusters]],
    *,
    harmonic: bool,
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]: ...
def bootstrap_difference(
    a: _Values,
    b: _Values,
    clusters: _Clusters,
    *,
    harmonic: bool,
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]: ...
def kps_difference(
    a: Sequence[_Values],
    b: Sequence[_Values],
    clusters: Sequence[_Clusters],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]: ...
def read_safetensors(path: str | os.PathLike[str]) -> tuple[list[tuple[str, Tensor]], dict[str, str]]: ...
def write_safetensors(
    descriptor: int,
    path: str | os.PathLike[str],
    tensors: Sequence[tuple[str, Tensor | tuple[str, Sequence[int], Iterator[Tensor]]]],
    metadata: Mapping[str, str],
) -> None: ...

# Component, module, A, B, bias of B, magnitude, alpha.
_Layer = tuple[str, str, Tensor, Tensor, Tensor | None, Tensor | None, float | None]

def adapter_layers(
    tensors: Sequence[tuple[str, Tensor]], known: Mapping[str, Sequence[str]], saving: bool
) -> tuple[str, str | None, list[_Layer]]: ...
def names_that_fit(pattern: str, names: Sequence[str]) -> list[bool]: ...
def adapter_tensors(layers: Sequence[_Layer], format: str, family: str | None) -> list[tuple[str, Tensor]]: ...
def cuda_architectures() -> list[int]: ...
def cuda_versions() -> tuple[tuple[str | None, str | None], tuple[str | None, str | None]]: ...
def compile_kernels(architecture: int, dtype: str) -> list[tuple[str, str]]: ...
def build_info() -> dict[str, str]: ...
