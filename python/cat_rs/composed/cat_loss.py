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
    sample_weight: Tensor | None
    mask: Tensor | None
    factor: float | Tensor


# What the arguments of a term are called.
_NAMES = (
    ("model_pred", "target", "sample_weight", "mask"),
    ("model_pred_no_trigger", "base_pred", "preserve_weight", "preserve_mask"),
)


@undisturbed
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
    wanted: tuple[bool, bool],
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `cat_rs.cat_loss`. Returns the total, [diffusion, cat] and the wanted gradients times ``scale``."""
    cat_factor = number("cat_factor", cat_factor)
    if not isinstance(mask_normalize, bool):
        kind = type(mask_normalize).__name__
        raise TypeError(f"argument 'mask_normalize': '{kind}' object cannot be converted to 'PyBool'")
    terms = [
        _Term(model_pred, target, sample_weight, mask, 1.0),
        _Term(model_pred_no_trigger, base_pred, preserve_weight, preserve_mask, cat_factor),
    ]
    total, parts, gradients = _evaluate(terms, mask_normalize, scale, wanted)
    return total, parts, gradients[0], gradients[1]


@undisturbed
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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `cat_rs.ops.cat_loss.student_loss`."""
    checks = Checks("CatStep")
    checks.floats("student", student)
    batch, preserved = (0 if each is None or each.dim() == 0 else len(each) for each in (target, base_pred))
    rows = 0 if student.dim() == 0 else len(student)
    if rows != batch + preserved or batch == 0 or (base_pred is not None and preserved == 0):
        expected = f"[{batch} + {preserved}, ...] as target and base have, none of them empty"
        checks.refuse_shape("student", expected, student)
    detached = student.detach()
    terms = [_Term(detached[:batch], target, sample_weight, mask, 1.0)]
    if base_pred is not None:
        terms.append(_Term(detached[batch:], base_pred, preserve_weight, preserve_mask, cat_factor))
    total, parts, gradients = _evaluate(terms, False, scale, (True, True))
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
    terms: Sequence[_Term], mask_normalize: bool, scale: float | Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """total = sum of factor * term; the terms; scale * dtotal/dpred of each where wanted."""
    _check(terms, scale)
    dtype = compute_dtype(*(tensor for term in terms for tensor in (term.pred, term.target)))
    wide = wide_dtype(terms[0].pred.device)
    values, gradients = [], []
    for (pred, target, sample_weight, mask, factor), want in zip(terms, wanted, strict=False):
        error = pred.to(dtype) - target.to(dtype)
        mask = None if mask is None else mask.to(dtype)
        masked = error if mask is None else mask * error
        weight = torch.ones(len(pred), dtype=wide, device=pred.device)
        if sample_weight is not None:
            weight = sample_weight.to(wide)
        share = weight / (len(weight) * _elements(pred.shape, mask if mask_normalize else None, wide))
        # A sample that is masked out whole has nothing to learn from: it counts as zero.
        share = torch.where(share.isfinite(), share, 0.0)
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


def _check(terms: Sequence[_Term], scale: float | Tensor) -> None:
    checks = Checks(_OP)
    for term, names in zip(terms, _NAMES, strict=False):
        for name, tensor in zip(names[:2], term[:2], strict=True):
            checks.floats(name, tensor)
    first = terms[0].pred.shape
    if not first or 0 in first:
        checks.refuse_shape("model_pred", "[B, ...] with no empty dimension", terms[0].pred)
    for term, (pred_name, target_name, _, _) in zip(terms, _NAMES, strict=False):
        shape = term.pred.shape
        if shape[1:] != first[1:] or len(shape) != len(first) or shape[0] == 0:
            sizes = "".join(f", {size}" for size in first[1:])
            checks.refuse_shape(pred_name, f"[P >= 1{sizes}]", term.pred)
        checks.shape(target_name, term.target, shape)
        checks.constant(target_name, term.target)
    for term in terms[1:]:
        _check_factor(checks, "cat_factor", term.factor)
        if _is_known(term.factor) and not 0 <= float(term.factor) < math.inf:
            checks.refuse("cat_factor", "a finite number >= 0", float(term.factor))
    _check_factor(checks, "scale", scale)
    for term, (_, _, weight_name, mask_name) in zip(terms, _NAMES, strict=False):
        if term.mask is not None:
            _check_mask(checks, mask_name, term.mask, term.pred.shape)
        if term.sample_weight is not None:
            _check_weight(checks, weight_name, term.sample_weight, term.pred.shape[:1])


def _check_weight(checks: Checks, name: str, weight: Tensor, shape: torch.Size) -> None:
    checks.floats(name, weight)
    checks.shape(name, weight, shape)
    checks.constant(name, weight)
    # On another device, to see the values would be to wait for them.
    if weight.device.type == "cpu":
        for index, value in enumerate(weight.tolist()):
            if not 0 <= value < math.inf:
                checks.refuse(name, "finite and >= 0 everywhere", f"{value} at index {index}")


def _check_mask(checks: Checks, name: str, mask: Tensor, shape: torch.Size) -> None:
    checks.dense(name, mask)
    checks.constant(name, mask)
    if mask.dtype != torch.bool:
        checks.floats(name, mask)
    if mask.dim() != len(shape) or any(own not in (1, size) for own, size in zip(mask.shape, shape, strict=False)):
        checks.refuse_shape(name, f"{list(shape)} up to dimensions of size 1", mask)


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
