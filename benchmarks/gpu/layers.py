"""LoRA layers, forward and backward, in the shapes of two U-Nets: PEFT, torch.compile of PEFT's layer, and cat_rs."""

from __future__ import annotations

from typing import Any

import torch

import cat_rs
from benchmarks import harness, models
from benchmarks import lora_linear as cpu_lora_linear
from benchmarks.gpu.kernels import name_of
from benchmarks.gpu.meter import Bench, measure, rotating, rotations
from benchmarks.harness import OURS, Case, Contender

BAR, BATCH_1_BAR = ">= 1.0", ">= 1.5"
TOLERANCE = 3e-2
COMPILED = "torch.compile"
MODELS = {"SD1.5 512 px": models.SD15, "SDXL 1024 px": models.SDXL}
BATCHES = (1, 4, 16)


def lora_linear(bench: Bench) -> None:
    """Every shape at every batch size; ``quick`` has batch size 1 and does not compile."""
    configs = {"tiny": models.TINY, "tiny SDXL": models.TINY_SDXL} if bench.smoke else MODELS
    for name, config in configs.items():
        shapes = models.linear_shapes(config)
        for batch in BATCHES[:1] if bench.quick or bench.smoke else BATCHES:
            ratios = {}
            for shape in sorted(shapes, key=str):
                if bench.leaves_out(f"{name}, batch {batch}, from {shape} on,"):
                    break
                ratios[shape] = _layer(bench, name, shape, batch)
            if not ratios:
                continue
            mean = [cpu_lora_linear.geometric_mean(column) for column in zip(*ratios.values(), strict=True)]
            where = f"lora_linear {name}, batch {batch}: PEFT / cat_rs"
            bench.report.add_value(f"{where}, geometric mean of {len(ratios)} shapes", *mean)
            worst = min(ratios, key=lambda shape: ratios[shape][0])
            bar = BATCH_1_BAR if batch == 1 else BAR
            bench.report.add_value(f"{where}, worst shape ({worst})", *ratios[worst], bar=bar)
    bench.report.note(
        f"Layer, adapter and input are {name_of(bench.meter.low_precision)}. Shapes: tokens of one sample x in -> out."
    )
    bench.report.note(
        "no dx: the layer's input needs no gradient (the text, and the layers before the first adapter)."
    )
    if bench.quick:
        bench.report.note(f"A quick run: batch 1, without {COMPILED}.")


def _layer(bench: Bench, model: str, shape: models.LinearShape, batch: int) -> tuple[float, ...]:
    """The ratio of the medians, and the 20th and 80th percentile of those of the rounds."""
    compiled = not bench.quick
    modules, layers = zip(*models.lora_layers(shape, bench.meter.low_precision, 2 + compiled), strict=True)
    for module in modules:
        module.to(bench.device)
    cat_rs.patch_peft(modules[1])
    contenders: dict[str, Any] = {"peft": layers[0], OURS: layers[1]}
    if compiled:
        torch._dynamo.reset()
        # A smoke run sees whether it is traced.
        contenders[COMPILED] = torch.compile(layers[2], dynamic=False, backend="eager" if bench.smoke else "inductor")

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        options: dict[str, Any] = {"device": bench.device, "dtype": bench.meter.low_precision}
        x = torch.randn(batch, shape.tokens, shape.in_features, **options).requires_grad_(shape.input_grad)
        return x, torch.randn(batch, shape.tokens, shape.out_features, **options)

    first = inputs()
    moved = sum(tensor.nbytes for tensor in first) + 2 * shape.in_features * shape.out_features
    sets = [first, *(inputs() for _ in range(rotations(moved, bench.meter.cache) - 1))]
    weights = {
        name: [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        for name, layer in zip(contenders, layers, strict=True)
    }

    def run(name: str, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x, upstream = given
        wanted = [*weights[name], *([x] if shape.input_grad else [])]
        return cpu_lora_linear.gradients(contenders[name], x, upstream, wanted)

    expected = cpu_lora_linear.reference(layers[0], *first)
    for name in contenders:
        for (what, value), got in zip(expected.items(), run(name, first), strict=True):
            harness.check_close(f"lora_linear {name} {what} {shape} batch {batch}", got, value, TOLERANCE)
    samples = measure(
        bench.meter,
        [Contender(name, rotating(lambda given, name=name: run(name, given), sets)) for name in contenders],
        bench.report.repeats,
        sample_seconds=1e-3,
    )
    bench.report.add_times(
        Case("forward+backward", name_of(bench.meter.low_precision), f"{model}, batch {batch}, {shape}"), samples
    )
    rounds = [a / b for a, b in zip(samples["peft"], samples[OURS], strict=True)]
    low, _, high = harness.quantiles(rounds)
    return harness.quantiles(samples["peft"])[1] / harness.quantiles(samples[OURS])[1], low, high
