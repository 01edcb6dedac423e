"""Training steps of U-Nets with random weights: what people run today, and CatStep, eager and recorded.

Each contender has the device to itself, so that its peak memory is its own: the model is made anew for each, with the
same weights. All take turns, once forwards and once backwards, so that a device that warms up slows all alike.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F

import cat_rs
from benchmarks import harness, models
from benchmarks.gpu.kernels import name_of
from benchmarks.gpu.meter import Bench, Peak, measure, without_tf32
from benchmarks.harness import Case, Contender
from benchmarks.step import LR, MAX_GRAD_NORM, UPDATE_TOLERANCE, WEIGHT_DECAY, flat
from cat_rs.step import cuda_graphs

PLAIN_GRAPHS = "plain LoRA, peft, torch.compile with graphs"
RECIPE_GRAPHS = "CAT, two models, torch.compile with graphs"
PLAIN, COMPILED, RECIPE = "plain LoRA, peft", "plain LoRA, peft, torch.compile", "CAT, two models, three calls"
OURS_EAGER, OURS_CAPTURED, FLOOR = "CAT, cat_rs", "CAT, cat_rs, captured", "floor: forwards and backward alone"
PLAIN_BAR, FLOOR_BAR, MEMORY_BAR = ">= 2", "<= 1.05", "<= 0.5"
# What CatStep runs eagerly before it records, and the recording.
WARM_UP = cuda_graphs.WARM_UP + 2
CHECKED_STEPS = WARM_UP + 2
PROVIDERS = (PLAIN, COMPILED, PLAIN_GRAPHS, RECIPE, RECIPE_GRAPHS, OURS_EAGER, OURS_CAPTURED, FLOOR)
COMPILING = (COMPILED, PLAIN_GRAPHS, RECIPE_GRAPHS)
TURNS = 2
# Steps between two looks at the clock.
CALLS = 5
# Of a contender's turn in a quick run.
QUICK_SECONDS = 15
# Of the first step's loss: both round to 16 bits at every layer, the recipe at another batch size.
LOSS_TOLERANCE = 2e-2

Step = Callable[[], torch.Tensor | None]


@dataclass(frozen=True)
class Subject:
    """A U-Net, its latents' size and what is promised of it.

    Attributes:
        name: In the table.
        config: Of the U-Net.
        batches: Batch sizes.
        recipe_bar: The authors' recipe / our captured step at batch 1.
        bars: Whether the other bars hold at batch 1.
        memory: Bytes that a card needs, or no contender would run.
    """

    name: str
    config: dict[str, Any]
    batches: tuple[int, ...]
    recipe_bar: str
    bars: bool
    memory: int


SD15 = Subject("SD1.5 512 px", models.SD15, (1, 4), ">= 5", True, 5 * 2**30)
SDXL = Subject("SDXL 1024 px", models.SDXL, (1, 4), ">= 2", False, 20 * 2**30)


@dataclass(frozen=True)
class Inputs:
    """Of a step, the same for every contender."""

    latents: torch.Tensor
    cond: dict[str, Any]
    cond_no_trigger: dict[str, Any]
    noise: torch.Tensor
    timesteps: torch.Tensor


def inputs_of(config: dict[str, Any], batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random."""
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    torch.manual_seed(1)
    shape = (batch, config.get("in_channels", 4), config["sample_size"], config["sample_size"])
    return Inputs(
        torch.randn(shape, **options),
        models.conditions(config, batch, **options),
        models.conditions(config, batch, **options),
        torch.randn(shape, **options),
        torch.randint(1000, (batch,), device=device),
    )


def unet_of(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The same weights in every call."""
    torch.manual_seed(0)
    return models.unet(config, str(device)).to(dtype)


class TorchStep:
    """A step as diffusers' training scripts have it, without their logging; with a base model, the CAT authors' one.

    Args:
        unet: With an adapter.
        base: The base model; None trains plain LoRA.
        call: What is called for the U-Net; by default itself.
        graphs: Whether torch.compile records graphs.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        base: Callable[..., Any] | None,
        call: Callable[..., Any] | None = None,
        *,
        graphs: bool = False,
    ) -> None:
        self.graphs = graphs
        self.base, self.call, self.scheduler = base, unet if call is None else call, models.scheduler()
        self.params = models.adapter(unet)
        self.optimizer = torch.optim.AdamW(self.params, lr=LR, weight_decay=WEIGHT_DECAY)

    def __call__(self, given: Inputs, *, drawn: bool = True) -> torch.Tensor:
        latents, noise, timesteps = given.latents, given.noise, given.timesteps
        if drawn:
            noise = torch.randn_like(latents)
            timesteps = torch.randint(
                self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
            )
        if self.graphs:
            # They may write to what the last step returned.
            torch.compiler.cudagraph_mark_step_begin()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        model_pred = self.call(noisy, timesteps, **given.cond, return_dict=False)[0]
        loss = F.mse_loss(model_pred.float(), noise.float(), reduction="mean")
        if self.base is not None:
            model_pred_no_trigger = self.call(noisy, timesteps, **given.cond_no_trigger, return_dict=False)[0]
            with torch.no_grad():
                base_pred = self.base(noisy, timesteps, **given.cond_no_trigger, return_dict=False)[0]
            loss = loss + F.mse_loss(model_pred_no_trigger.float(), base_pred.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class OurStep:
    """CatStep, eager or recorded."""

    def __init__(self, unet: torch.nn.Module, captured: bool) -> None:
        self.params = models.adapter(unet)
        self.step = cat_rs.CatStep(
            unet,
            models.scheduler(),
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            capture=captured,
        )

    def __call__(self, given: Inputs, *, drawn: bool = True) -> torch.Tensor:
        draws = {} if drawn else {"noise": given.noise, "timesteps": given.timesteps}
        return self.step(given.latents, given.cond, given.cond_no_trigger, **draws).loss


def floor_of(unet: torch.nn.Module, given: Inputs) -> Step:
    """The base model's forward, the doubled batch's forward and its backward as one graph, and nothing else."""
    cat_rs.patch_peft(unet)
    for param in models.adapter(unet):
        param.grad = torch.zeros_like(param)
    doubled = {
        "latents": torch.cat([given.latents, given.latents]),
        "timesteps": torch.cat([given.timesteps, given.timesteps]),
        "cond": _joined(given.cond, given.cond_no_trigger),
    }
    upstream = torch.randn_like(doubled["latents"])

    def work() -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), cat_rs.adapter_disabled(unet):
            base = unet(given.latents, given.timesteps, **given.cond_no_trigger, return_dict=False)[0]
        student = unet(doubled["latents"], doubled["timesteps"], **doubled["cond"], return_dict=False)[0]
        torch.autograd.backward(student, upstream)
        return base, student.detach()

    graphs = cuda_graphs.CudaGraphs(given.latents.device)
    for _ in range(cuda_graphs.WARM_UP):
        with graphs.side_stream():
            work()
    replay = graphs.record(work)

    def step() -> None:
        replay()

    return step


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _joined(value, second[name]) if isinstance(value, Mapping) else torch.cat([value, second[name]])
        for name, value in first.items()
    }


def make(provider: str, config: dict[str, Any], given: Inputs, backend: str = "inductor") -> Any:
    """A contender with a model of its own; it is called with the inputs."""
    device, dtype = given.latents.device, given.latents.dtype
    unet = models.add_lora(unet_of(config, device, dtype))
    if provider == PLAIN:
        return TorchStep(unet, None)
    if provider in COMPILING:
        torch._dynamo.reset()
        # Without the compiler there is nothing to choose.
        mode = "reduce-overhead" if provider != COMPILED and backend == "inductor" else None
        base = unet_of(config, device, dtype) if provider == RECIPE_GRAPHS else None
        call, base_call = (
            None if each is None else torch.compile(each, dynamic=False, backend=backend, mode=mode)
            for each in (unet, base)
        )
        return TorchStep(unet, base_call, call, graphs=mode is not None)
    if provider == RECIPE:
        return TorchStep(unet, unet_of(config, device, dtype))
    if provider == FLOOR:
        replay = floor_of(unet, given)
        return lambda given: replay()
    return OurStep(unet, captured=provider == OURS_CAPTURED)


def check(bench: Bench) -> None:
    """A tiny U-Net in float32: the adapters after some steps, of which the last are replays, are the recipe's."""
    given = inputs_of(models.TINY_SDXL, 2, bench.device, torch.float32)
    changes = {}
    with without_tf32():
        for provider in (RECIPE, OURS_EAGER, OURS_CAPTURED):
            step = make(provider, models.TINY_SDXL, given)
            start = flat(step.params)
            for _ in range(CHECKED_STEPS):
                step(given, drawn=False)
            changes[provider] = flat(step.params) - start
    for provider in (OURS_EAGER, OURS_CAPTURED):
        error = float((changes[provider] - changes[RECIPE]).norm() / changes[RECIPE].norm())
        if not error <= UPDATE_TOLERANCE:
            raise harness.BenchmarkError(
                f"step: after {CHECKED_STEPS} steps the change of the adapter of '{provider}' differs from '{RECIPE}' "
                f"by {error:.3g} of its norm; expected at most {UPDATE_TOLERANCE}"
            )


@dataclass(frozen=True)
class Result:
    """What one contender took."""

    seconds: list[float]
    peak: Peak
    loss: float | None


def run(bench: Bench, provider: str, config: dict[str, Any], batch: int) -> Result | None:
    """One contender alone on the device; None, and a note, where it cannot run."""
    gc.collect()
    bench.meter.reset_peak()
    given = inputs_of(config, batch, bench.device, bench.meter.low_precision)
    try:
        with warnings.catch_warnings():
            # A step that falls back to eager is none of those that are compared.
            warnings.filterwarnings("error", "CatStep: capture", RuntimeWarning)
            # torch.compile on a helper of diffusers.
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
            step = make(provider, config, given, "eager" if bench.smoke else "inductor")
            # Making a model takes more than the model: it is made in float32.
            bench.meter.reset_peak()
            loss = float(step(given, drawn=False)) if provider in (RECIPE, OURS_EAGER, OURS_CAPTURED) else None
            contender = Contender(provider, lambda: step(given))
            samples = measure(
                bench.meter,
                [contender],
                math.ceil(bench.report.repeats / TURNS),
                warm_up=WARM_UP,
                sample_seconds=0,
                least_calls=1 if bench.smoke else CALLS,
                most_seconds=QUICK_SECONDS if bench.quick else math.inf,
            )
    except (torch.OutOfMemoryError, RuntimeWarning, cuda_graphs.NotCapturable, TorchDynamoException) as error:
        reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error).splitlines()[0]
        bench.report.note(f"{provider}, batch {batch}, did not run: {reason}")
        return None
    return Result(samples[provider], bench.meter.peak(), loss)


def compare(bench: Bench, subject: Subject) -> None:
    """All contenders, in turns; ``quick`` has batch size 1 and does not compile."""
    if bench.leaves_out(subject.name, subject.memory):
        return
    check(bench)
    config = subject.config
    if bench.smoke:
        config = models.TINY_SDXL if "addition_embed_type" in subject.config else models.TINY
    for batch in subject.batches[:1] if bench.quick else subject.batches:
        providers = [provider for provider in PROVIDERS if not (bench.quick and provider in COMPILING)]
        results: dict[str, Result] = {}
        for _ in range(TURNS):
            failed = []
            for provider in providers:
                if bench.leaves_out(f"{provider}, batch {batch}"):
                    continue
                result = run(bench, provider, config, batch)
                if result is None:
                    failed.append(provider)
                elif provider in results:
                    results[provider].seconds.extend(result.seconds)
                else:
                    results[provider] = result
            providers = [provider for provider in reversed(providers) if provider not in failed]
        _check_losses(subject, batch, results)
        _report(bench, subject, batch, results)
    bench.report.note(
        "Each contender alone on the device, all in turn, once forwards and once backwards. U-Net and adapter in "
        f"{name_of(bench.meter.low_precision)}, rank {models.RANK}; no gradient checkpointing. Peak memory: of "
        "tensors, from the made model on."
    )
    bench.report.note(
        f"{PLAIN}: as diffusers' training scripts, without their logging, which waits for the device in every step. "
        f"{RECIPE}: as CAT's authors train, a second U-Net as the base. {FLOOR}: recorded as a graph."
    )
    if bench.quick:
        bench.report.note("A quick run: batch 1, without torch.compile.")


def _check_losses(subject: Subject, batch: int, results: Mapping[str, Result]) -> None:
    losses = {name: result.loss for name, result in results.items() if result.loss is not None}
    expected = losses.get(RECIPE)
    for name, loss in losses.items():
        if expected is not None and not abs(loss - expected) <= LOSS_TOLERANCE * abs(expected):
            raise harness.BenchmarkError(
                f"step {subject.name} batch {batch}: the first loss of '{name}' is {loss:.6g}, that of '{RECIPE}' "
                f"{expected:.6g}"
            )


def _report(bench: Bench, subject: Subject, batch: int, results: Mapping[str, Result]) -> None:
    case = Case("step", name_of(bench.meter.low_precision), f"{subject.name}, batch {batch}")
    bench.report.add_times(case, {name: result.seconds for name, result in results.items()})
    for name, result in results.items():
        for metric, value in (("peak memory", result.peak.allocated), ("peak reserved", result.peak.reserved)):
            bench.report.add(name, case, metric, "GiB", [value / 2**30])

    def ratio(what: str, first: str, second: str, bar: str | None) -> None:
        if first in results and second in results:
            bench.report.add_ratio(
                f"{case.shape}: {what}", results[first].seconds, results[second].seconds, bar if batch == 1 else None
            )

    def optional(bar: str) -> str | None:
        return bar if subject.bars else None

    ratio("authors' recipe / cat_rs captured", RECIPE, OURS_CAPTURED, subject.recipe_bar)
    ratio("authors' recipe / cat_rs eager", RECIPE, OURS_EAGER, None)
    ratio("plain LoRA, peft / CAT, cat_rs captured", PLAIN, OURS_CAPTURED, optional(PLAIN_BAR))
    ratio("plain LoRA, torch.compile / CAT, cat_rs captured", COMPILED, OURS_CAPTURED, None)
    ratio("plain LoRA, torch.compile with graphs / CAT, cat_rs captured", PLAIN_GRAPHS, OURS_CAPTURED, None)
    ratio("authors' recipe, torch.compile with graphs / cat_rs captured", RECIPE_GRAPHS, OURS_CAPTURED, None)
    ratio("cat_rs captured / floor", OURS_CAPTURED, FLOOR, FLOOR_BAR)
    if RECIPE in results and OURS_CAPTURED in results:
        peaks = [[float(results[name].peak.allocated)] for name in (OURS_CAPTURED, RECIPE)]
        if min(map(min, peaks)) > 0:
            bar = optional(MEMORY_BAR) if batch == 1 else None
            bench.report.add_ratio(f"{case.shape}: peak memory, cat_rs captured / recipe", *peaks, bar)


def step_sd15(bench: Bench) -> None:
    """Stable Diffusion 1.5."""
    compare(bench, SD15)


def step_sdxl(bench: Bench) -> None:
    """Stable Diffusion XL."""
    compare(bench, SDXL)
