"""Frozen convolutions of Stable Diffusion 1.5's lower resolutions, forward and backward: PyTorch and cat_rs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import OURS, Case, Contender
from cat_rs.ops.frozen_conv2d import FrozenConv2dFunction, max_output_positions

NAME = "frozen_conv2d"
CHANNELS = ((1280, 1280), (2560, 1280), (640, 1280), (640, 640))
SIZES = (2, 4, 8, 16)
GEOMETRY: Any = ((1, 1), (1, 1), (1, 1))
TOLERANCE = 1e-5


def run(inner: int, out: int, batch: int, size: int, report: harness.Report) -> None:
    """One layer on one input."""
    weight, bias = torch.randn(out, inner, 3, 3), torch.randn(out)
    x = torch.randn(batch, inner, size, size, requires_grad=True)
    layers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "torch": lambda x: F.conv2d(x, weight, bias, *GEOMETRY),
        OURS: lambda x: FrozenConv2dFunction.apply(x, weight, bias, *GEOMETRY),
    }
    upstream = torch.randn(batch, out, size, size)

    def gradient(layer: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        y = layer(x)
        return y.detach(), torch.autograd.grad(y, x, upstream)[0]

    exact = x.detach().double().requires_grad_()
    y = F.conv2d(exact, weight.double(), bias.double(), *GEOMETRY)
    expected = y.detach(), torch.autograd.grad(y, exact, upstream.double())[0]
    for name, layer in layers.items():
        for what, got, value in zip(("y", "dx"), gradient(layer), expected, strict=True):
            harness.check_close(f"{NAME} {name} {what} {inner}->{out} {batch}x{size}x{size}", got, value, TOLERANCE)

    case = Case("forward+backward", "float32", f"{inner}->{out} 3x3 on {batch}x{size}x{size}")
    contenders = [Contender(name, lambda layer=layer: gradient(layer)) for name, layer in layers.items()]
    samples = harness.measure(contenders, report.repeats, warm_up=1)
    report.add_times(case, samples)
    # The weight is read forward and backward.
    report.add_bandwidth(case, 2 * weight.nbytes, {OURS: samples[OURS]})
    used = batch * size * size <= max_output_positions(weight.numel())
    report.add_ratio(f"torch / cat_rs, {case.shape}{'' if used else ' (not used)'}", samples["torch"], samples[OURS])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser(__doc__ or "", repeats=20).parse_args(argv)
    report = harness.start(NAME, "Frozen convolutions on small inputs, forward and backward", options, argv)
    for inner, out in ((8, 8),) if report.smoke else CHANNELS:
        for batch in (1, 2):
            for size in SIZES[:2] if report.smoke else SIZES:
                run(inner, out, batch, size, report)
    report.note(
        "not used: layers of too few weights or on too many positions, by max_output_positions; CatStep and "
        "patch_peft leave them to PyTorch."
    )
    report.note("bandwidth: of reading the weight once forward and once backward, which has to happen.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
