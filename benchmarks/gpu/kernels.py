"""The kernels of cat_rs and what PyTorch and diffusers offer in their place; bandwidth against the device's copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tests import references
from torch.nn import functional as F

import cat_rs
from benchmarks import adamw as cpu_adamw
from benchmarks import cat_loss as cpu_cat_loss
from benchmarks import harness, models
from benchmarks.gpu.meter import Bench, copy_contender, measure, rotating, rotations
from benchmarks.harness import OURS, Case, Contender
from cat_rs.ops.noising import noising as our_noising
from cat_rs.step.noise_schedule import NoiseSchedule

SHARE_BAR, LOSS_BAR = ">= 0.85", ">= 4"
SMALL = (4, 4, 64, 64)
# 64 Mi elements.
LARGE = (64, 16, 256, 256)
TINY = (2, 4, 8, 8)
LOSS_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# diffusers rounds its table to the latents' dtype.
NOISING_TOLERANCES = {"diffusers": 0.1, OURS: 1e-2}
OUR_KERNEL = "cat_rs, values and gradients"

Tensors = tuple[torch.Tensor, ...]


def name_of(value: torch.dtype | Sequence[int]) -> str:
    """A dtype or shape in a table."""
    return str(value).removeprefix("torch.").replace(" ", "")


def loss_bytes(elements: int, itemsize: int) -> int:
    """Four inputs are read and two gradients written."""
    return 6 * elements * itemsize


def adamw_bytes(elements: int) -> int:
    """In float32: the norm reads g; the update reads p, g, m, v and writes p, m, v and a zero g."""
    return 9 * 4 * elements


def noising_bytes(elements: int, itemsize: int, copies: int, *, writes_target: bool) -> int:
    """Latents and noise are read; the copies, and a target that is not the noise, are written."""
    return (2 + copies + writes_target) * elements * itemsize


def cat_loss(bench: Bench) -> None:
    """The weighted loss, forward and backward."""
    sizes = [TINY] if bench.smoke else [SMALL, LARGE]
    for shape in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            _cat_loss(bench, shape, dtype)
    bench.report.note("torch eager: F.mse_loss of each term in float32, weighted, as training scripts write it.")
    bench.report.note(f"{OUR_KERNEL}: cat_loss without its backward, which only hands the gradients over.")


def _cat_loss(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    elements = torch.Size(shape).numel()
    moved = loss_bytes(elements, dtype.itemsize)
    # The inputs and their gradients, the check in float64, and what PyTorch keeps for its backward pass.
    if bench.leaves_out(f"cat_loss {name_of(shape)} {name_of(dtype)}", elements * (8 * dtype.itemsize + 8 * 8)):
        return

    def inputs() -> Tensors:
        drawn = [torch.randn(shape, device=bench.device, dtype=dtype) for _ in range(4)]
        weight = torch.rand(shape[0], device=bench.device) + 0.5
        return drawn[0].requires_grad_(), drawn[1], drawn[2].requires_grad_(), drawn[3], weight

    def with_gradients(loss: Callable[..., torch.Tensor], given: Tensors) -> Tensors:
        total = loss(*given)
        return total.detach(), *torch.autograd.grad(total, (given[0], given[2]))

    sets = [inputs() for _ in range(rotations(moved, bench.meter.cache))]
    losses = {"torch eager": cpu_cat_loss.eager, OURS: cpu_cat_loss.ours}

    def check() -> None:
        exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in sets[0]]
        expected = with_gradients(cpu_cat_loss.reference, tuple(exact))
        del exact
        whats = ("loss", "gradient", "gradient without trigger")
        for provider, loss in losses.items():
            for what, got, reference in zip(whats, with_gradients(loss, sets[0]), expected, strict=True):
                where = f"cat_loss {provider} {what} {shape} {dtype}"
                harness.check_close(where, got, reference, LOSS_TOLERANCES[dtype])

    # Whose tensors are gone when it returns.
    check()
    contenders = [
        *(
            Contender(provider, rotating(lambda given, loss=loss: with_gradients(loss, given), sets))
            for provider, loss in losses.items()
        ),
        Contender(OUR_KERNEL, rotating(lambda given: cpu_cat_loss.ours(*given), sets)),
        copy := copy_contender(moved, bench.meter),
    ]
    samples = measure(bench.meter, contenders, bench.report.repeats)
    case = Case("forward+backward", name_of(dtype), name_of(shape))
    bench.report.add_times(case, {name: times for name, times in samples.items() if name != copy.name})
    bench.report.add_bandwidth(case, moved, {name: samples[name] for name in (OURS, OUR_KERNEL, copy.name)})
    where = f"cat_loss {case.shape} {case.dtype}"
    bench.report.add_ratio(
        f"{where}: torch eager / cat_rs", samples["torch eager"], samples[OURS], LOSS_BAR if shape == SMALL else None
    )
    bench.report.add_ratio(
        f"{where}: share of the copy's bandwidth",
        samples[copy.name],
        samples[OUR_KERNEL],
        SHARE_BAR if shape == LARGE else None,
    )


def adamw(bench: Bench) -> None:
    """Clipping, update and zeroing of one large buffer, and of Stable Diffusion 1.5's adapter."""
    config = models.config(bench.smoke)
    adapter = [tuple(param.shape) for param in models.adapter(models.add_lora(models.unet(config, "meta")))]
    _adamw(bench, [(10_000,)] if bench.smoke else [(torch.Size(LARGE).numel(),)], SHARE_BAR)
    _adamw(bench, adapter, None)
    bench.report.note("adamw: every set has gradients, which are zero after a step; the time does not depend on them.")


def _adamw(bench: Bench, shapes: list[tuple[int, ...]], bar: str | None) -> None:
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    moved = adamw_bytes(elements)
    # Of three contenders weights, gradients and moments; the start, two gradients and the changes.
    if bench.leaves_out(f"adamw of {elements} values", 4 * elements * (3 * 4 + 6)):
        return
    makers: dict[str, Callable[[list[torch.nn.Parameter]], Callable[[], None]]] = {
        "torch foreach": lambda params: cpu_adamw.torch_step(params, set_to_none=False, foreach=True),
        "torch fused": lambda params: cpu_adamw.torch_step(params, set_to_none=False, fused=True),
        OURS: cpu_adamw.our_step,
    }
    start = [torch.randn(shape, device=bench.device) * 0.02 for shape in shapes]
    grads = [torch.randn(shape, device=bench.device) * 0.01 for shape in shapes]
    count = rotations(moved, bench.meter.cache)
    sets = {name: [[torch.nn.Parameter(value.clone()) for value in start] for _ in range(count)] for name in makers}
    steps = {name: [make(params) for params in sets[name]] for name, make in makers.items()}
    # A set without gradients would not be stepped.
    for name in makers:
        for params in sets[name]:
            cpu_adamw.fill(params, grads)
    for turn in range(cpu_adamw.CHECKED_STEPS):
        for name in makers:
            # Another gradient each time, or the moments' bias correction would cancel.
            cpu_adamw.fill(sets[name][0], [grad * (-1.0) ** turn + 0.01 * turn for grad in grads])
            steps[name][0]()
    change = {
        name: torch.cat([(param.detach() - value).flatten() for param, value in zip(each[0], start, strict=True)])
        for name, each in sets.items()
    }
    for name in (OURS, "torch fused"):
        harness.check_close(
            f"adamw {name}: change of the weights after {cpu_adamw.CHECKED_STEPS} steps",
            change[name],
            change["torch foreach"],
            1e-3,
        )
    del change, start, grads
    contenders = [
        *(Contender(name, rotating(lambda step: step(), each)) for name, each in steps.items()),
        copy := copy_contender(moved, bench.meter),
    ]
    samples = measure(bench.meter, contenders, bench.report.repeats)
    case = Case("clip+step+zero", "float32", f"{len(shapes)} tensors, {elements} values")
    bench.report.add_times(case, {name: samples[name] for name in makers})
    bench.report.add_bandwidth(case, moved, {name: samples[name] for name in (OURS, copy.name)})
    for name in makers:
        if name != OURS:
            bench.report.add_ratio(f"adamw, {case.shape}: {name} / cat_rs", samples[name], samples[OURS])
    bench.report.add_ratio(
        f"adamw, {case.shape}: share of the copy's bandwidth", samples[copy.name], samples[OURS], bar
    )


def noising(bench: Bench) -> None:
    """Noisy latents, target and doubled batch."""
    for shape in [TINY] if bench.smoke else [SMALL, LARGE]:
        for prediction_type in ("epsilon", "v_prediction"):
            _noising(bench, shape, prediction_type)
    bench.report.note(
        "diffusers: add_noise, get_velocity where the target is a velocity, torch.cat of z_t with itself. It rounds "
        "its table to the latents' dtype, far from the float64 table; cat_rs does not."
    )


def _noising(bench: Bench, shape: tuple[int, ...], prediction_type: str) -> None:
    dtype, copies = torch.bfloat16, 2
    scheduler, velocity = models.scheduler(), prediction_type == "v_prediction"
    schedule = NoiseSchedule(scheduler, prediction_type, bench.device)
    elements = torch.Size(shape).numel()
    moved = noising_bytes(elements, dtype.itemsize, copies, writes_target=velocity)
    # Inputs and outputs, and the check in float64.
    if bench.leaves_out(f"noising {prediction_type} {name_of(shape)}", elements * (10 * dtype.itemsize + 8 * 8)):
        return

    def inputs() -> Tensors:
        latents, noise = (torch.randn(shape, device=bench.device, dtype=dtype) for _ in range(2))
        return latents, noise, schedule.draw(shape[0])

    def diffusers_way(given: Tensors) -> Tensors:
        noisy = scheduler.add_noise(*given)
        return torch.cat([noisy, noisy]), scheduler.get_velocity(*given) if velocity else given[1]

    def our_way(given: Tensors) -> Tensors:
        latents, noise, timesteps = given
        return our_noising(latents, noise, *schedule.rates(timesteps, shape[0]), prediction_type, copies=copies)

    sets = [inputs() for _ in range(rotations(moved, bench.meter.cache))]
    latents, noise, timesteps = sets[0]
    table = scheduler.alphas_cumprod.to(bench.device, torch.float64)[timesteps]
    noisy, target = references.noising(latents, noise, table.sqrt(), (1 - table).sqrt(), prediction_type)
    ways: dict[str, Callable[[Tensors], Tensors]] = {"diffusers": diffusers_way, OURS: our_way}
    for name, way in ways.items():
        tolerance, (doubled, got) = NOISING_TOLERANCES[name], way(sets[0])
        harness.check_close(f"noising {name} z_t {shape}", doubled, torch.cat([noisy, noisy]), tolerance)
        harness.check_close(f"noising {name} target {shape}", got, target, tolerance)
    del noisy, target, doubled, got, latents, noise, timesteps, table
    copy = copy_contender(moved, bench.meter)
    contenders = [*(Contender(name, rotating(way, sets)) for name, way in ways.items()), copy]
    samples = measure(bench.meter, contenders, bench.report.repeats)
    case = Case(prediction_type, name_of(dtype), name_of(shape))
    bench.report.add_times(case, {name: samples[name] for name in ways})
    bench.report.add_bandwidth(case, moved, {name: samples[name] for name in (OURS, copy.name)})
    where = f"noising {prediction_type} {case.shape}"
    bench.report.add_ratio(f"{where}: diffusers / cat_rs", samples["diffusers"], samples[OURS])
    bench.report.add_ratio(f"{where}: share of the copy's bandwidth", samples[copy.name], samples[OURS])


def similarity(bench: Bench) -> None:
    """s(a_i, b_i) of many pairs."""
    count, width = (1000, 64) if bench.smoke else (1_000_000, 512)
    # F.cosine_similarity makes as much again.
    if bench.leaves_out(f"similarity {count}x{width}", 4 * 4 * count * width):
        return
    a, b = (torch.randn(count, width, device=bench.device) for _ in range(2))
    part = slice(0, 10_000)
    expected = (1 + F.cosine_similarity(a[part].double(), b[part].double(), dim=1)) / 2
    harness.check_close("similarity cat_rs", cat_rs.similarity(a, b)[part], expected, 1e-5)
    moved = a.nbytes + b.nbytes
    operations: dict[str, Callable[[], Any]] = {
        "torch": lambda: F.cosine_similarity(a, b, dim=1),
        OURS: lambda: cat_rs.similarity(a, b),
    }
    copy = copy_contender(moved, bench.meter)
    contenders = [*(Contender(name, operation) for name, operation in operations.items()), copy]
    samples = measure(bench.meter, contenders, bench.report.repeats)
    case = Case("pairs", "float32", f"{count}x{width}")
    bench.report.add_times(case, {name: samples[name] for name in operations})
    bench.report.add_bandwidth(case, moved, {name: samples[name] for name in (OURS, copy.name)})
    bench.report.add_ratio(f"F.cosine_similarity / cat_rs, {case.shape}", samples["torch"], samples[OURS])
    bench.report.add_ratio("similarity: share of the copy's bandwidth", samples[copy.name], samples[OURS])
    bench.report.note("similarity only reads; the copy also writes. cat_rs names rows that are zero or not finite.")
