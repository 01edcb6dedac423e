"""Frozen linear layers of Stable Diffusion 1.5 at 512 px, forward and backward: PyTorch and cat_rs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import OURS, Case, Contender
from cat_rs.ops.frozen_linear import frozen_linear
from cat_rs.ops.operator import OWN_MATMUL_IS_FASTER

NAME = "frozen_linear"
# Positions, in, out: projections, and both layers of the feed-forward blocks.
SHAPES = (
    (4096, 320, 320),
    (4096, 320, 2560),
    (4096, 1280, 320),
    (1024, 640, 640),
    (1024, 640, 5120),
    (1024, 2560, 640),
    (256, 1280, 1280),
    (256, 1280, 10240),
    (256, 5120, 1280),
    (64, 1280, 1280),
    (64, 1280, 10240),
    (64, 5120, 1280),
)
TOLERANCE = 1e-5


def run(rows: int, inner: int, out: int, report: harness.Report) -> None:
    """One layer on one input."""
    x = torch.randn(rows, inner, requires_grad=True)
    weight, bias, upstream = torch.randn(out, inner), torch.randn(out), torch.randn(rows, out)
    layers: dict[str, Callable[..., torch.Tensor]] = {"torch": F.linear, OURS: frozen_linear}

    def gradient(layer: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        y = layer(x, weight, bias)
        return y.detach(), torch.autograd.grad(y, x, upstream)[0]

    expected = F.linear(x.detach().double(), weight.double(), bias.double()), upstream.double() @ weight.double()
    for name, layer in layers.items():
        for what, got, value in zip(("y", "dx"), gradient(layer), expected, strict=True):
            harness.check_close(f"{NAME} {name} {what} {rows}x{inner}->{out}", got, value, TOLERANCE)

    case = Case("forward+backward", "float32", f"{rows}x{inner}->{out}")
    contenders = [Contender(name, lambda layer=layer: gradient(layer)) for name, layer in layers.items()]
    samples = harness.measure(contenders, report.repeats, warm_up=1)
    report.add_times(case, samples)
    for name, seconds in samples.items():
        rates = [4.0 * rows * inner * out / second / 1e9 for second in seconds]
        report.add(name, case, "rate", "GFLOP/s", rates)
    report.add_ratio(f"torch / cat_rs, {case.shape}", samples["torch"], samples[OURS])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser(__doc__ or "", repeats=20).parse_args(argv)
    report = harness.start(NAME, "Frozen linear layers of Stable Diffusion 1.5, forward and backward", options, argv)
    for shape in ((64, 128, 128),) if report.smoke else SHAPES:
        run(*shape, report)
    if not OWN_MATMUL_IS_FASTER:
        report.note("On this processor cat_rs uses PyTorch's products: both columns are the same code.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
