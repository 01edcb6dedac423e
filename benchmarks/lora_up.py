"""Convolutions with LoRA, forward and backward, at the resolutions of Stable Diffusion 1.5: PEFT and cat_rs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import cat_rs
from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender

NAME = "lora_up"
PEFT = "peft"
# Channels in and out, kernel size, and height and width of the picture.
SHAPES = (
    (320, 320, 3, 64),
    (640, 320, 3, 64),
    (320, 320, 1, 64),
    (640, 640, 3, 32),
    (640, 640, 1, 32),
    (1280, 1280, 3, 16),
    (1280, 1280, 1, 16),
    (1280, 1280, 3, 8),
)
SMOKE_SHAPES = ((8, 8, 3, 6), (8, 8, 1, 6))
TOLERANCE = 1e-4


def layers(inner: int, out: int, kernel: int) -> Iterator[tuple[str, torch.nn.Module]]:
    """Equal convolutions with LoRA: PEFT's layer and the fused one."""
    from peft import LoraConfig, inject_adapter_in_model

    for name in (PEFT, OURS):
        torch.manual_seed(0)
        module: torch.nn.Module = torch.nn.Sequential(torch.nn.Conv2d(inner, out, kernel, padding=kernel // 2))
        module.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=models.RANK, lora_alpha=models.RANK // 2, target_modules=["0"]), module)
        with torch.no_grad():
            for param in models.adapter(module):
                param.normal_(0.0, 0.02)
        if name == OURS and not cat_rs.patch_peft(module).fused:
            raise harness.BenchmarkError(f"{NAME}: patch_peft fused no layer")
        yield name, module


def run(shape: tuple[int, int, int, int], report: harness.Report) -> None:
    """One layer on one picture."""
    inner, out, kernel, size = shape
    x = torch.randn(1, inner, size, size, requires_grad=True)
    upstream = torch.randn(1, out, size, size)
    both = dict(layers(inner, out, kernel))

    def gradients(module: torch.nn.Module) -> tuple[Any, ...]:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, [x, *models.adapter(module)], upstream)

    for what, ours, theirs in zip(("y", "dx", "dA", "dB"), gradients(both[OURS]), gradients(both[PEFT]), strict=True):
        harness.check_close(f"{NAME} {what} {shape}", ours, theirs, TOLERANCE)
    text = f"{inner}->{out} {kernel}x{kernel} on 1x{size}x{size}"
    contenders = [Contender(name, lambda module=module: gradients(module)) for name, module in both.items()]
    samples = harness.measure(contenders, report.repeats)
    report.add_times(Case("forward+backward", "float32", text), samples)
    report.add_ratio(f"PEFT / cat_rs, {text}", samples[PEFT], samples[OURS])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser(__doc__ or "", repeats=30).parse_args(argv)
    report = harness.start(NAME, "Convolutions with LoRA, forward and backward", options, argv)
    for shape in SMOKE_SHAPES if options.smoke else SHAPES:
        run(shape, report)
    report.note("The convolutions themselves, of the base layer and of A, are PyTorch's on both sides.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
