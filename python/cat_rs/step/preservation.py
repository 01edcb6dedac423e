"""What keeps the base model: the terms that a step can have for it.

In each, lambda is ``cat_factor``, and the loss is L_diff + lambda * L, but for ``dco``.

====== ====================================================================== =============================
name   L                                                                      source
====== ====================================================================== =============================
cat    mean (f(c0) - f_base(c0))^2                                            Park et al., arXiv 2404.07554
prior  mean (f(c0) - y')^2, on pictures that the base model drew              Ruiz et al., arXiv 2208.12242
dco    the loss is -log sigmoid(-lambda ((f(c) - y)^2 - (f_base(c) - y)^2))   Lee et al., arXiv 2402.12004
l2     sum over layers of ||s B A||_F^2, the change of the weights            Kim et al., ICLR 2026
layers mean over layers of mean (s B A x)^2 / mean (W x + b)^2, x of the base this project
====== ====================================================================== =============================

``l2`` follows "Preserve and Personalize: Personalized Text-to-Image Diffusion Models without Distributional Drift"
(openreview 2ge1Y6DWPw), which bounds the change of the weights. Its code adds up ||A||^2 + ||B||^2 instead, which also
draws A to zero where B is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cat_rs.arguments import check
from cat_rs.dtypes import compute_dtype
from cat_rs.errors import InvalidValueError
from cat_rs.ops.cat_loss import student_loss

__all__ = ["NO_PRESERVATION", "PRESERVATIONS", "Preservation", "consistency_loss", "find_preservation"]


class Preservation(NamedTuple):
    """What a step computes for a preservation term.

    Attributes:
        pairs: Whether the student also predicts samples with cond_no_trigger.
        base: Name of the condition for which the base model predicts; None if it does not.
        penalty: What the loss gets beside squared errors of the student: "update", "layers" or None.
        adds_up: Whether the loss is the sum of a diffusion term and a weighted term, so that the latter may come in
            some steps only, and its weight may follow both.
    """

    pairs: bool = False
    base: str | None = None
    penalty: str | None = None
    adds_up: bool = True

    @property
    def looks_at_samples(self) -> bool:
        """Whether it is about samples with cond_no_trigger."""
        return self.pairs or self.base == "cond_no_trigger"


PRESERVATIONS = {
    "cat": Preservation(pairs=True, base="cond_no_trigger"),
    "prior": Preservation(pairs=True),
    "dco": Preservation(base="cond", adds_up=False),
    "l2": Preservation(penalty="update"),
    "layers": Preservation(base="cond_no_trigger", penalty="layers"),
}
NO_PRESERVATION = Preservation()


def find_preservation(name: str, *, every: int, has_bank: bool, trains_text: bool) -> Preservation:
    """The term of a name; refuses what cannot stand beside it."""
    check("CatStep", "preservation", name, f"one of {', '.join(PRESERVATIONS)}", lambda name: name in PRESERVATIONS)
    term = PRESERVATIONS[name]
    refused = {
        "teacher_bank": has_bank and name != "cat",
        "preserve_every": every != 1 and not term.adds_up,
        "text_encoders": trains_text and term.penalty == "layers",
    }
    for argument in (argument for argument, is_given in refused.items() if is_given):
        raise InvalidValueError(f"CatStep: `{argument}` must not be given with preservation={name!r}")
    return term


def consistency_loss(
    student: Tensor,
    target: Tensor,
    base_pred: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    beta: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct Consistency Optimization (arXiv 2402.12004), outside of autograd: ``dco``.

    L = -mean_i log sigmoid(-beta (e_i - e_base_i)), e_i = w_i mean(m (f(c) - y)^2). A sample has its own sigmoid, so
    that batch size and accumulation do not matter; the authors' code, alike at batch 1, takes the batch's mean inside.

    Args:
        student: f(z_t, t, c), [B, ...].
        target: y, [B, ...].
        base_pred: f_base(z_t, t, c), [B, ...].
        sample_weight: w, [B], >= 0.
        mask: m, of the target's shape up to dimensions of size 1.
        beta: 0-dim.
        scale: Of the gradient, 0-dim.

    Returns:
        The loss; [mean e, mean (e - e_base)]; scale * dL/dstudent, of the student's shape and dtype.
    """
    # It checks all arguments but the base prediction, which the model made.
    student_loss(student, target, None, sample_weight, mask, None, None, 0.0, 0.0)
    prediction, dtype = student.detach().requires_grad_(), compute_dtype(student, target, base_pred)

    def errors(pred: Tensor) -> Tensor:
        squares = (pred.to(dtype) - target.to(dtype)).square()
        means = (squares if mask is None else mask * squares).flatten(1).mean(1)
        return means if sample_weight is None else sample_weight * means

    with torch.enable_grad():
        own = errors(prediction)
        margins = own - errors(base_pred)
        loss = -functional.logsigmoid(-beta * margins).mean()
        (grad,) = torch.autograd.grad(loss, prediction, scale.to(loss.dtype))
    return loss.detach(), torch.stack([own.mean(), margins.mean()]).detach(), grad
