"""A LoRA layer, forward and backward, in all the shapes of Stable Diffusion 1.5 at 512 px: PEFT and cat_rs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tests import references

import cat_rs
from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender

NAME = "lora_linear"
MEAN_BAR, WORST_BAR = ">= 1.12", ">= 1.0"
BFLOAT16_REPEATS = 5
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def gradients(
    layer: Any, x: torch.Tensor, upstream: torch.Tensor, wanted: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Output and gradients of the layer."""
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, wanted, upstream)


def reference(layer: Any, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients in float64."""
    base = layer.get_base_layer()
    bias = None if base.bias is None else base.bias.double()
    inputs = x.detach().double().requires_grad_(x.requires_grad)
    a, b = (part["default"].weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    y = references.lora_linear(inputs, base.weight.double(), bias, a, b, layer.scaling["default"])
    wanted = {"dA": a, "dB": b} | ({"dx": inputs} if x.requires_grad else {})
    return {"y": y.detach()} | dict(
        zip(wanted, torch.autograd.grad(y, list(wanted.values()), upstream.double()), strict=True)
    )


def run(
    shape: models.LinearShape, count: int, dtype: torch.dtype, repeats: int, report: harness.Report
) -> tuple[float, ...]:
    """One shape; returns the ratio of the medians and the 20th and 80th percentile of the ratios of the rounds."""
    (_, plain), (fused_model, fused) = models.lora_layers(shape, dtype, 2)
    if not cat_rs.patch_peft(fused_model).fused:
        raise harness.BenchmarkError(f"{NAME}: patch_peft fused no layer for {shape}")
    x = torch.randn(1, shape.tokens, shape.in_features, dtype=dtype, requires_grad=shape.input_grad)
    upstream = torch.randn(1, shape.tokens, shape.out_features, dtype=dtype)
    layers = {"peft": plain, OURS: fused}
    wanted = {
        name: [layer.lora_A["default"].weight, layer.lora_B["default"].weight, *([x] if shape.input_grad else [])]
        for name, layer in layers.items()
    }
    expected = reference(plain, x, upstream)
    for name, layer in layers.items():
        for (what, value), got in zip(expected.items(), gradients(layer, x, upstream, wanted[name]), strict=True):
            harness.check_close(f"{NAME} {name} {what} {shape} {dtype}", got, value, TOLERANCES[dtype])

    contenders = [
        Contender(name, lambda name=name, layer=layer: gradients(layer, x, upstream, wanted[name]))
        for name, layer in layers.items()
    ]
    samples = harness.measure(contenders, repeats)
    dtype_name = str(dtype).removeprefix("torch.")
    report.add_times(Case("forward+backward", dtype_name, f"{shape} (x{count})"), samples)
    rounds = [a / b for a, b in zip(samples["peft"], samples[OURS], strict=True)]
    low, _, high = harness.quantiles(rounds)
    return harness.quantiles(samples["peft"])[1] / harness.quantiles(samples[OURS])[1], low, high


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser(__doc__ or "", repeats=50).parse_args(argv)
    report = harness.start(NAME, "LoRA layers of Stable Diffusion 1.5 at 512 px, forward and backward", options, argv)
    shapes = models.linear_shapes(models.config(options.smoke))
    for dtype in (torch.float32, torch.bfloat16):
        # A processor without bfloat16 arithmetic takes a second for one of these.
        repeats = report.repeats if dtype == torch.float32 else min(report.repeats, BFLOAT16_REPEATS)
        ratios = {
            shape: run(shape, count, dtype, repeats, report) for shape, count in sorted(shapes.items(), key=_order)
        }
        bars = (MEAN_BAR, WORST_BAR) if dtype == torch.float32 else (None, None)
        name = str(dtype).removeprefix("torch.")
        mean = [geometric_mean(column) for column in zip(*ratios.values(), strict=True)]
        report.add_value(f"PEFT / cat_rs, {name}, geometric mean of {len(ratios)} shapes", *mean, bar=bars[0])
        worst = min(ratios, key=lambda shape: ratios[shape][0])
        report.add_value(f"PEFT / cat_rs, {name}, worst shape ({worst})", *ratios[worst], bar=bars[1])
        for shape, values in ratios.items():
            report.add_value(f"PEFT / cat_rs, {name}, {shape}", *values)
    report.note("Shapes: tokens x in -> out, recorded from the model; in brackets how many of its layers have it.")
    report.note("no dx: the layer's input needs no gradient (the text, and the layers before the first adapter).")
    report.note(f"bfloat16: at most {BFLOAT16_REPEATS} rounds.")
    report.note("Each distinct shape counts once in the geometric mean.")
    return harness.finish(report, options)


def _order(item: tuple[models.LinearShape, int]) -> tuple[bool, int, int, int, bool, bool]:
    shape = item[0]
    text = shape.tokens == models.TOKENS
    return text, -shape.tokens, shape.in_features, shape.out_features, shape.bias, not shape.input_grad


if __name__ == "__main__":
    sys.exit(main())
