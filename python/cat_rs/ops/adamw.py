"""AdamW with gradient clipping over flat buffers."""

from __future__ import annotations

from torch import Tensor

from cat_rs._native import core_of
from cat_rs.ops.operator import stream_of

__all__ = ["adamw_step", "sum_of_squares"]


def sum_of_squares(grad: Tensor, sums: Tensor, index: int) -> None:
    """Writes sum(grad^2) into ``sums[index]``: one pass over memory, whose order of additions is always the same.

    Args:
        grad: Contiguous; float32, float64, bfloat16 or float16.
        sums: [K], float64, on the device of ``grad``.
        index: In 0..K - 1.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, InvalidValueError: Naming the argument, what was expected and
            what came.
    """
    core_of(grad).sum_of_squares(grad, sums, index, stream=stream_of(grad))


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
) -> None:
    """One AdamW step (Loshchilov & Hutter, arXiv 1711.05101) over flat buffers, in place and in one pass over memory.

    With norm = sqrt(sum(sums)) and t the raised step count: g = min(1, max_grad_norm / (norm + 1e-6)) grad;
    p = p (1 - lr weight_decay); m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    p = p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps). The gradients are zero afterwards.

    Where the norm is not finite, only the gradients become zero and ``skipped`` is raised by one. All tensors are
    contiguous and on one device. On CUDA the call waits for nothing, so values are not checked.

    Args:
        param: p, [N], float32 or float64.
        grad: [N], of any float dtype.
        exp_avg: m, [N], in the dtype of ``param``.
        exp_avg_sq: v, likewise.
        low_precision: [N]; gets the new weights, rounded to its dtype. Or None.
        settings: [6], float64: lr, beta1, beta2, eps, weight_decay, max_grad_norm (infinite: no clipping).
        sums: [K], float64: the sums of squares of all buffers that are clipped together; see :func:`sum_of_squares`.
        step: The number of steps taken, 0-dim float32; raised by one.
        skipped: The number of steps skipped, 0-dim int64, or None.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, InvalidValueError: Naming the argument, what was expected and
            what came.
    """
    core_of(param).adamw_step(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        low_precision,
        settings=settings,
        sums=sums,
        step=step,
        skipped=skipped,
        stream=stream_of(param),
    )
