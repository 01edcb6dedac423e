"""The CAT loss, forward and backward, with per-sample weights: eager PyTorch, torch.compile and cat_rs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product

import torch
from tests import references
from torch.nn import functional as F

import cat_rs
from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender

NAME = "cat_loss"
CAT_FACTOR = 1.0
# shape -> (eager / ours, torch.compile / ours), for float32
BARS = {(1, 4, 64, 64): (">= 2", ">= 2.5"), (4, 4, 128, 128): (">= 5", ">= 2")}
# Relative to the largest element; the gradients have the predictions' dtype.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
COMPILED = "torch.compile"

Loss = Callable[..., torch.Tensor]


def eager(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    model_pred_no_trigger: torch.Tensor,
    base_pred: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """As training scripts write it, with the weight of the two terms shared."""
    diffusion = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    diffusion = diffusion.mean(dim=list(range(1, diffusion.dim()))) * weight
    cat = F.mse_loss(model_pred_no_trigger.float(), base_pred.float(), reduction="none")
    cat = cat.mean(dim=list(range(1, cat.dim()))) * weight
    return diffusion.mean() + CAT_FACTOR * cat.mean()


def ours(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    model_pred_no_trigger: torch.Tensor,
    base_pred: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """cat_rs, called in the same way."""
    return cat_rs.cat_loss(
        model_pred, target, model_pred_no_trigger, base_pred, cat_factor=CAT_FACTOR, sample_weight=weight
    )


def reference(*inputs: torch.Tensor) -> torch.Tensor:
    """In float64."""
    return references.cat_loss(*inputs[:4], cat_factor=CAT_FACTOR, sample_weight=inputs[4]).total


def gradients(loss: Loss, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Forward and backward. Predictions are inner nodes in training: nothing is accumulated into a .grad."""
    total = loss(*inputs)
    return total, *torch.autograd.grad(total, (inputs[0], inputs[2]))


def run(shape: tuple[int, ...], dtype: torch.dtype, report: harness.Report) -> None:
    """One shape and one dtype of the predictions; the target is float32."""
    inputs = [torch.randn(shape) for _ in range(4)]
    inputs = [tensor if place == 1 else tensor.to(dtype) for place, tensor in enumerate(inputs)]
    for place in (0, 2):
        inputs[place].requires_grad_()
    inputs.append(torch.rand(shape[0]) + 0.5)

    losses: dict[str, Loss] = {"torch": eager, OURS: ours}
    if not report.smoke:
        # A fresh cache a case: a second shape would otherwise be compiled for any shape, and be slower.
        torch.compiler.reset()
        losses[COMPILED] = torch.compile(eager, dynamic=False)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    expected = gradients(reference, exact)
    for name, loss in losses.items():
        for what, got, value in zip(("loss", "d/dpred", "d/dpred0"), gradients(loss, inputs), expected, strict=True):
            tolerance = 1e-5 if what == "loss" else TOLERANCES[dtype]
            harness.check_close(f"{NAME} {name} {what} {shape} {dtype}", got, value, tolerance)

    # All four inputs are read and two gradients written, whatever computes them.
    moved = sum(tensor.nbytes for tensor in inputs[:4]) + inputs[0].nbytes + inputs[2].nbytes
    copy = harness.copy_contender(moved)
    contenders = [Contender(name, lambda loss=loss: gradients(loss, inputs)) for name, loss in losses.items()]
    samples = harness.measure([*contenders, copy], report.repeats)
    name = str(dtype).removeprefix("torch.")
    case = Case("forward+backward", name, str(shape).replace(" ", ""))
    report.add_times(case, {key: value for key, value in samples.items() if key != copy.name})
    report.add_bandwidth(case, moved, {key: samples[key] for key in (OURS, copy.name)})
    bars = BARS.get(shape, (None, None)) if dtype == torch.float32 else (None, None)
    for provider, words, bar in (("torch", "eager", bars[0]), (COMPILED, COMPILED, bars[1])):
        if provider in samples:
            report.add_ratio(f"{words} / cat_rs, {name}, {case.shape}", samples[provider], samples[OURS], bar)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser(__doc__ or "", repeats=100).parse_args(argv)
    report = harness.start(NAME, "CAT loss, weighted, forward and backward", options, argv)
    for dtype, shape in product((torch.float32, torch.bfloat16), models.latent_shapes(options.smoke)):
        run(shape, dtype, report)
    report.note("dtype: of the three predictions and of both gradients; the target is float32 throughout.")
    report.note(
        "copy: torch's copy of as many bytes as the loss must move (four inputs read, two gradients written), half "
        "of them read and half written. It is the limit of the memory, or of a cache where the case fits into one."
    )
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
