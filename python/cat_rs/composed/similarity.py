"""Similarities of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from cat_rs.composed.checks import Checks, text, undisturbed
from cat_rs.dtypes import compute_dtype, wide_dtype

__all__ = ["cross_similarity", "paired_similarity"]

# Rows whose similarities with all others are in memory at once.
_ROWS = 256


@undisturbed
def paired_similarity(a: Tensor, b: Tensor, stream: int = 0) -> Tensor:
    """See `cat_rs.similarity`."""
    checks = _check(a, b)
    checks.shape("b", b, a.shape)
    cosines = (_directions(checks, "a", a) * _directions(checks, "b", b)).sum(1)
    return _mapped(cosines).to(compute_dtype(a, b))


@undisturbed
def cross_similarity(a: Tensor, b: Tensor, reduce: str, stream: int = 0) -> Tensor:
    """See `cat_rs.cross_similarity`."""
    reduce = text("reduce", reduce)
    if reduce not in ("mean", "max"):
        Checks("similarity").refuse("reduce", "'mean' or 'max'", f"'{reduce}'")
    checks = _check(a, b)
    if b.shape[1] != a.shape[1]:
        checks.refuse_shape("b", f"[M, {a.shape[1]}]", b)
    first, second = _directions(checks, "a", a), _directions(checks, "b", b)
    if reduce == "mean":
        cosines = first @ second.mean(0)
    else:
        cosines = torch.cat([(rows @ second.T).amax(1) for rows in first.split(_ROWS)])
    return _mapped(cosines).to(compute_dtype(a, b))


def _mapped(cosines: Tensor) -> Tensor:
    return ((1 + cosines) / 2).clamp(0, 1)


def _directions(checks: Checks, argument: str, embeddings: Tensor) -> Tensor:
    """The rows as unit vectors; refuses those without a direction."""
    rows = embeddings.to(wide_dtype(embeddings.device)).contiguous()
    # Scaled by the largest element first, so that no square leaves the range.
    rows = rows / rows.abs().amax(1, keepdim=True)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    sound = norms.isfinite()
    if not sound.all():
        row = int((~sound).nonzero()[0, 0])
        checks.refuse(argument, "finite with no zero row", f"row {row}, which is zero, infinite or NaN")
    return rows / norms


def _check(a: Tensor, b: Tensor) -> Checks:
    checks = Checks("similarity")
    for name, tensor in (("a", a), ("b", b)):
        checks.floats(name, tensor)
        if tensor.dim() != 2 or tensor.numel() == 0:
            checks.refuse_shape(name, "[N, D] with N, D >= 1", tensor)
    return checks
