"""Clipping, AdamW and zeroing on Stable Diffusion 1.5's rank-16 attention LoRA: torch.optim and cat_rs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

import cat_rs
from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender

NAME = "adamw"
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
MAX_GRAD_NORM = 1.0
BARS = {"torch foreach": ">= 8", "torch fused": ">= 2.5"}
CHECKED_STEPS = 5

Parameters = list[torch.nn.Parameter]


def torch_step(params: Parameters, *, set_to_none: bool = True, **flags: bool) -> Callable[[], None]:
    """clip_grad_norm_, AdamW and zero_grad of PyTorch; without gradients, the next step would do nothing."""
    optimizer = torch.optim.AdamW(params, **SETTINGS, **flags)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

    return step


def flat_fused_step(params: Parameters) -> Callable[[], None]:
    """PyTorch's fused AdamW with all values in one tensor: what a patient user can get from PyTorch itself."""
    flat = torch.nn.Parameter(torch.cat([param.detach().flatten() for param in params]))
    flat.grad = torch.zeros_like(flat)
    sizes = [param.numel() for param in params]
    for param, value, grad in zip(params, flat.detach().split(sizes), flat.grad.split(sizes), strict=True):
        param.data, param.grad = value.view(param.shape), grad.view(param.shape)
    optimizer = torch.optim.AdamW([flat], **SETTINGS, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_([flat], MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def our_step(params: Parameters) -> Callable[[], None]:
    """FlatAdamW clips and zeroes as it steps."""
    optimizer = cat_rs.FlatAdamW(params, **SETTINGS, max_grad_norm=MAX_GRAD_NORM)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def fill(params: Parameters, grads: Sequence[torch.Tensor]) -> None:
    """What a backward pass leaves behind: values in .grad, allocated where there is none."""
    for param, grad in zip(params, grads, strict=True):
        if param.grad is None:
            param.grad = grad.clone()
        else:
            param.grad.copy_(grad)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser(__doc__ or "", repeats=100).parse_args(argv)
    report = harness.start(NAME, "Gradient clipping, AdamW and zeroing of a LoRA", options, argv)
    shapes = [
        param.shape for param in models.adapter(models.add_lora(models.unet(models.config(options.smoke), "meta")))
    ]
    start = [torch.randn(shape) * 0.02 for shape in shapes]
    grads = [torch.randn(shape) * 0.01 for shape in shapes]

    makers: dict[str, Callable[[Parameters], Callable[[], None]]] = {
        "torch foreach": lambda params: torch_step(params, foreach=True),
        "torch fused": lambda params: torch_step(params, fused=True),
        "torch fused, flat": flat_fused_step,
        OURS: our_step,
    }
    sets = {name: [torch.nn.Parameter(value.clone()) for value in start] for name in makers}
    steps = {name: make(sets[name]) for name, make in makers.items()}

    exact = [torch.nn.Parameter(value.double()) for value in start]
    exact_step = torch_step(exact, foreach=True)
    for number in range(CHECKED_STEPS):
        # Another gradient each time, or the moments' bias correction would cancel.
        turned = [grad * (-1.0) ** number + 0.01 * number for grad in grads]
        fill(exact, [grad.double() for grad in turned])
        exact_step()
        for name, step in steps.items():
            fill(sets[name], turned)
            step()
    moved = torch.cat([param.detach().flatten() for param in exact]) - torch.cat([v.flatten() for v in start]).double()
    for name, params in sets.items():
        change = torch.cat(
            [(param.detach().double() - value).flatten() for param, value in zip(params, start, strict=True)]
        )
        # The weights are about a hundred times the change, which float32 therefore resolves to 1e-5.
        harness.check_close(f"{NAME} {name}: change of the weights after {CHECKED_STEPS} steps", change, moved, 1e-3)

    contenders = [
        Contender(name, step, prepare=lambda params=sets[name]: fill(params, grads)) for name, step in steps.items()
    ]
    count = sum(value.numel() for value in start)
    # The norm reads g; the update reads p, g, m, v and writes p, m, v and a zero g.
    moved = 9 * 4 * count
    copy = harness.copy_contender(moved)
    samples = harness.measure([*contenders, copy], report.repeats)
    case = Case("clip+step+zero", "float32", f"{len(shapes)} tensors, {count} values")
    report.add_times(case, {name: samples[name] for name in steps})
    report.add_bandwidth(case, moved, {name: samples[name] for name in (OURS, copy.name)})
    for name in steps:
        if name != OURS:
            report.add_ratio(f"{name} / cat_rs", samples[name], samples[OURS], BARS.get(name))
    report.add_ratio("copy of as many bytes / cat_rs", samples[copy.name], samples[OURS])
    report.note("The gradients are filled anew before each step, outside the timed region.")
    report.note("torch foreach, fused: clip_grad_norm_(foreach=True), AdamW(...), zero_grad() to None.")
    report.note("torch fused, flat: the same values as one tensor, which PyTorch offers no help with.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
