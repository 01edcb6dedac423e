"""AdamW with gradient clipping over flat buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cat_rs.composed.checks import Checks, dtype_name, integer, undisturbed
from cat_rs.dtypes import compute_dtype, wide_dtype

__all__ = ["adamw_step", "sum_of_squares"]

_OP = "adamw"
_REAL = (torch.float32, torch.float64)
_SETTINGS = ("lr", "beta1", "beta2", "eps", "weight_decay")


@undisturbed
def sum_of_squares(grad: Tensor, sums: Tensor, index: int, stream: int = 0) -> None:
    """See `cat_rs.ops.adamw.sum_of_squares`."""
    index = integer("index", index, -(2**63), 2**63 - 1, "-2**63..2**63 - 1")
    checks = Checks(_OP)
    checks.floats("grad", grad)
    checks.contiguous("grad", grad)
    _check_sums(checks, sums)
    if not 0 <= index < len(sums):
        checks.refuse("index", f"in 0..{len(sums)}", index)
    sums[index] = grad.to(compute_dtype(grad)).square().sum(dtype=sums.dtype)


@undisturbed
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
) -> None:
    """See `cat_rs.ops.adamw.adamw_step`."""
    _check(param, grad, exp_avg, exp_avg_sq, low_precision, settings, sums, step, skipped)
    norm = sums.sum().sqrt()
    # Chosen on the device: to ask it would be to wait.
    taken = norm.isfinite()
    lr, beta1, beta2, eps, weight_decay, max_grad_norm = settings.unbind()
    count = step.to(settings.dtype) + 1
    # As clip_grad_norm_: the 1e-6 keeps a zero norm from dividing.
    g = grad.to(param.dtype) * (max_grad_norm / (norm + 1e-6)).clamp(max=1)
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    step_size, root = lr / (1 - beta1**count), (1 - beta2**count).sqrt()
    p = param * (1 - lr * weight_decay) - step_size * m / (v.sqrt() / root + eps)
    for state, new in ((param, p), (exp_avg, m), (exp_avg_sq, v), (step, count)):
        state.copy_(torch.where(taken, new, state))
    if low_precision is not None:
        low_precision.copy_(torch.where(taken, param.to(low_precision.dtype), low_precision))
    if skipped is not None:
        skipped.add_(~taken)
    grad.zero_()


def _check(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low_precision: Tensor | None,
    settings: Tensor,
    sums: Tensor,
    step: Tensor,
    skipped: Tensor | None,
) -> None:
    checks = Checks(_OP)
    checks.dtype("param", param, _REAL, "float32 or float64 (lower precisions are a copy)")
    buffers = [("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)]
    for name, tensor in buffers[2:]:
        checks.dtype(name, tensor, (param.dtype,), "the dtype of `param`")
    checks.floats("grad", grad)
    if low_precision is not None:
        checks.floats("low_precision", low_precision)
        buffers.insert(2, ("low_precision", low_precision))
    for name, tensor in buffers:
        checks.shape(name, tensor, param.shape)
        checks.contiguous(name, tensor)
    checks.dtype("settings", settings, _REAL, "float32 or float64")
    checks.shape("settings", settings, [6])
    checks.contiguous("settings", settings)
    _check_sums(checks, sums)
    checks.dtype("step", step, (torch.float32,), "float32")
    checks.shape("step", step, [])
    if skipped is not None:
        checks.dtype("skipped", skipped, (torch.int64,), "int64")
        checks.shape("skipped", skipped, [])
    # On another device, to see the values would be to wait for them.
    if param.device.type == "cpu":
        _check_values(checks, settings.tolist(), float(step))


def _check_sums(checks: Checks, sums: Tensor) -> None:
    dtype = wide_dtype(sums.device)
    checks.dtype("sums", sums, (dtype,), dtype_name(dtype))
    if sums.dim() != 1 or sums.numel() == 0:
        checks.refuse_shape("sums", "[K] with K >= 1", sums)
    checks.contiguous("sums", sums)


def _check_values(checks: Checks, settings: list[float], step: float) -> None:
    for name, value in zip(_SETTINGS, settings, strict=False):
        below, expected = (1.0, "in [0, 1)") if "beta" in name else (math.inf, "a finite number >= 0")
        if not 0 <= value < below:
            checks.refuse(name, expected, value)
    if not settings[-1] > 0:
        checks.refuse("max_grad_norm", "> 0", settings[-1])
    if not 0 <= step < math.inf:
        checks.refuse("step", "a count >= 0", step)
