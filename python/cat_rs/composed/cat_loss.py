"""The CAT loss and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cat_rs.composed.checks import Checks, dtype_name, number, undisturbed
from cat_rs.dtypes import compute_dtype, wide_dtype

__all__ = ["cat_loss", "scale_gradients", "student_loss"]

_OP = "cat_loss"


class _Term(NamedTuple):
    """mean_i w_i mean_x m (pred - target)^2, and what weighs it in the loss."""

    pred: Tensor
    target: Tensor
    factor: float | Tensor


@undisturbed
def cat_loss(
    model_pred: Tensor,
    target: Tensor,
    model_pred_no_trigger: Tensor,
    base_pred: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    cat_factor: float,
    mask_normalize: bool,
    scale: float | Tensor,
    wanted: tuple[bool, bool],
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `cat_rs.cat_loss`. Returns the total, [diffusion, cat] and the wanted gradients times ``scale``."""
    cat_factor = number("cat_factor", cat_factor)
    if not isinstance(mask_normalize, bool):
        kind = type(mask_normalize).__name__
        raise TypeError(f"argument 'mask_normalize': '{kind}' object cannot be converted to 'PyBool'")
    terms = [_Term(model_pred, target, 1.0), _Term(model_pred_no_trigger, base_pred, cat_factor)]
    total, parts, gradients = _evaluate(terms, sample_weight, mask, mask_normalize, scale, wanted)
    return total, parts, gradients[0], gradients[1]


@undisturbed
def student_loss(
    student: Tensor,
    target: Tensor,
    base_pred: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    cat_factor: float | Tensor,
    scale: float | Tensor,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `cat_rs.ops.cat_loss.student_loss`."""
    checks = Checks("CatStep")
    checks.floats("student", student)
    halves = 1 if base_pred is None else 2
    if student.dim() == 0 or len(student) == 0 or len(student) % halves:
        checks.refuse_shape("student", f"[{halves} * B, ...] with B >= 1", student)
    first, *others = student.detach().chunk(halves)
    terms = [_Term(first, target, 1.0)]
    if base_pred is not None:
        terms.append(_Term(others[0], base_pred, cat_factor))
    total, parts, gradients = _evaluate(terms, sample_weight, mask, False, scale, (True, True))
    return total, parts, torch.cat([gradient for gradient in gradients if gradient is not None])


@undisturbed
def scale_gradients(first: Tensor | None, second: Tensor | None, factor: Tensor, stream: int = 0) -> None:
    """Multiplies gradients by a factor on their device, in place."""
    checks = Checks(_OP)
    checks.dense("factor", factor)
    given = [(name, grad) for name, grad in (("first", first), ("second", second)) if grad is not None]
    for name, gradient in given:
        checks.floats(name, gradient)
        checks.contiguous(name, gradient)
    _check_factor(checks, "factor", factor)
    for _, gradient in given:
        gradient.mul_(factor.reshape(()))


def _evaluate(
    terms: Sequence[_Term],
    sample_weight: Tensor | None,
    mask: Tensor | None,
    mask_normalize: bool,
    scale: float | Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """total = sum of factor * term; the terms; scale * dtotal/dpred of each where wanted."""
    _check(terms, sample_weight, mask, scale)
    shape, device = terms[0].pred.shape, terms[0].pred.device
    dtype = compute_dtype(*(tensor for term in terms for tensor in (term.pred, term.target)))
    wide = wide_dtype(device)
    weight = torch.ones(len(terms[0].pred), dtype=wide, device=device)
    if sample_weight is not None:
        weight = sample_weight.to(wide)
    mask = None if mask is None else mask.to(dtype)
    share = weight / (len(weight) * _elements(shape, mask if mask_normalize else None, wide))
    # A sample that is masked out whole has nothing to learn from: it counts as zero.
    share = torch.where(share.isfinite(), share, 0.0)
    values, gradients = [], []
    for (pred, target, factor), want in zip(terms, wanted, strict=False):
        error = pred.to(dtype) - target.to(dtype)
        masked = error if mask is None else mask * error
        sums = (masked * error).flatten(1).sum(1, dtype=wide) if error.dim() > 1 else (masked * error).to(wide)
        values.append((share * sums).sum())
        by_sample = (2.0 * factor * scale * share).to(dtype).reshape([-1] + [1] * (error.dim() - 1))
        gradients.append((by_sample * masked).to(pred.dtype) if want else None)
    parts = torch.stack([*values, torch.zeros_like(values[0])][:2])
    total = values[0] if len(terms) == 1 else values[0] + terms[1].factor * values[1]
    return total.to(dtype), parts.to(dtype), gradients


def _elements(shape: torch.Size, mask: Tensor | None, wide: torch.dtype) -> float | Tensor:
    """The elements of a sample that count: a number, or with a mask its sums, [B]."""
    if mask is None:
        return float(math.prod(shape[1:]))
    return mask.to(wide).expand(shape).reshape(shape[0], -1).sum(1)


def _check(terms: Sequence[_Term], sample_weight: Tensor | None, mask: Tensor | None, scale: float | Tensor) -> None:
    checks = Checks(_OP)
    names = (("model_pred", "target"), ("model_pred_no_trigger", "base_pred"))
    pairs = [
        (name, tensor)
        for term, both in zip(terms, names, strict=False)
        for name, tensor in zip(both, term[:2], strict=True)
    ]
    for name, tensor in pairs:
        checks.floats(name, tensor)
    shape = terms[0].pred.shape
    for name, tensor in pairs:
        checks.shape(name, tensor, shape)
        if name in ("target", "base_pred"):
            checks.constant(name, tensor)
    if not shape or 0 in shape:
        checks.refuse_shape("model_pred", "[B, ...] with no empty dimension", terms[0].pred)
    for term in terms[1:]:
        _check_factor(checks, "cat_factor", term.factor)
        if _is_known(term.factor) and not 0 <= float(term.factor) < math.inf:
            checks.refuse("cat_factor", "a finite number >= 0", float(term.factor))
    _check_factor(checks, "scale", scale)
    if mask is not None:
        _check_mask(checks, mask, shape)
    if sample_weight is not None:
        checks.floats("sample_weight", sample_weight)
        checks.shape("sample_weight", sample_weight, shape[:1])
        checks.constant("sample_weight", sample_weight)
        # On another device, to see the values would be to wait for them.
        if sample_weight.device.type == "cpu":
            for index, value in enumerate(sample_weight.tolist()):
                if not 0 <= value < math.inf:
                    checks.refuse("sample_weight", "finite and >= 0 everywhere", f"{value} at index {index}")


def _check_mask(checks: Checks, mask: Tensor, shape: torch.Size) -> None:
    checks.dense("mask", mask)
    checks.constant("mask", mask)
    if mask.dtype != torch.bool:
        checks.floats("mask", mask)
    if mask.dim() != len(shape) or any(own not in (1, size) for own, size in zip(mask.shape, shape, strict=False)):
        checks.refuse_shape("mask", f"{list(shape)} up to dimensions of size 1", mask)


def _check_factor(checks: Checks, argument: str, factor: float | Tensor) -> None:
    if not isinstance(factor, Tensor):
        number(argument, factor)
        return
    checks.floats(argument, factor)
    if factor.dtype not in (torch.float32, torch.float64) or factor.numel() != 1:
        got = f"{dtype_name(factor.dtype)} of shape {list(factor.shape)}"
        checks.refuse(argument, "one float32 or float64 element", got)


def _is_known(factor: float | Tensor) -> bool:
    """Whether the host has the number."""
    return not isinstance(factor, Tensor) or factor.device.type == "cpu"
