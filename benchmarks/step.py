"""A training step of Stable Diffusion 1.5's U-Net with random weights: the usual PyTorch recipes and CatStep.

The time is measured with all contenders in one process, taking turns; the memory with each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

import cat_rs
from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender

NAME = "step"
TIME_BAR, MEMORY_BAR, SHARE_BAR = ">= 1.25", "<= 0.6", "<= 0.03"
LR, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1e-2, 1.0
CHECKED_STEPS = 2
# Adam turns a gradient into its sign where it is small: the few elements whose gradient is rounding alone differ.
UPDATE_TOLERANCE = 1e-3
RECIPE, ONE_MODEL = "two models, three calls", "one model, adapter off"
PLAIN, OUR_PLAIN = "peft plain LoRA", "cat_rs plain LoRA"
PROVIDERS = (RECIPE, ONE_MODEL, OURS, PLAIN, OUR_PLAIN)
# Latents' height and width; at 64 a round takes minutes, so the recipe with two models is left out.
SMALL, LARGE = 16, 64
LARGE_PROVIDERS, LARGE_ROUNDS = PROVIDERS[1:], 3

Inputs = Mapping[str, torch.Tensor]


class TorchStep:
    """The recipe in PyTorch; with a second model as the base, the one of CAT's authors.

    Args:
        unet: With an adapter.
        base: The base model; `unet` itself is called with its adapter off; None trains plain LoRA.
    """

    def __init__(self, unet: torch.nn.Module, base: torch.nn.Module | None) -> None:
        self.unet, self.base, self.scheduler = unet, base, models.scheduler()
        self.params = models.adapter(unet)
        self.optimizer = torch.optim.AdamW(self.params, lr=LR, weight_decay=WEIGHT_DECAY)

    def __call__(
        self,
        latents: torch.Tensor,
        cond: torch.Tensor,
        cond_no_trigger: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> None:
        noise = torch.randn_like(latents) if noise is None else noise
        if timesteps is None:
            timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),))
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        model_pred = self.unet(noisy, timesteps, cond, return_dict=False)[0]
        loss = F.mse_loss(model_pred.float(), noise.float(), reduction="mean")
        if self.base is not None:
            model_pred_no_trigger = self.unet(noisy, timesteps, cond_no_trigger, return_dict=False)[0]
            base_pred = self._base_pred(noisy, timesteps, cond_no_trigger)
            loss = loss + F.mse_loss(model_pred_no_trigger.float(), base_pred.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _base_pred(self, noisy: torch.Tensor, timesteps: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        if self.base is self.unet:
            self.unet.disable_adapters()
        base_pred = self.base(noisy, timesteps, cond, return_dict=False)[0]
        if self.base is self.unet:
            self.unet.enable_adapters()
        return base_pred


class OurStep:
    """CatStep, and how much of each step passed in the model's own forward and backward.

    Attributes:
        shares: One a step, of the time outside the model.
    """

    def __init__(self, unet: torch.nn.Module, cat_factor: float) -> None:
        self.model_seconds = 0.0
        self.shares: list[float] = []
        self.params = models.adapter(unet)
        self.step = cat_rs.CatStep(
            unet,
            models.scheduler(),
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            cat_factor=cat_factor,
            predict=self._predict,
        )

    def _predict(
        self, model: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]
    ) -> torch.Tensor:
        with self._in_model():
            return model(latents, timesteps, **cond, return_dict=False)[0]

    @contextmanager
    def _in_model(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.model_seconds += time.perf_counter() - start

    def __call__(self, *inputs: torch.Tensor, **given: torch.Tensor) -> None:
        backward = torch.autograd.backward

        def timed_backward(*arguments: Any, **options: Any) -> None:
            with self._in_model():
                backward(*arguments, **options)

        self.model_seconds = 0.0
        torch.autograd.backward = timed_backward
        try:
            start = time.perf_counter()
            self.step(*inputs, **given)
            total = time.perf_counter() - start
        finally:
            torch.autograd.backward = backward
        self.shares.append(1 - self.model_seconds / total)


def make(provider: str, unet: torch.nn.Module, settings: dict[str, Any]) -> TorchStep | OurStep:
    """A contender with its own adapter on the given U-Net, and its own copy of the U-Net where it needs one."""
    if provider == RECIPE:
        base = models.unet(settings)
        base.load_state_dict(unet.state_dict())
        return TorchStep(models.add_lora(unet), base)
    if provider == ONE_MODEL:
        adapted = models.add_lora(unet)
        return TorchStep(adapted, adapted)
    if provider == PLAIN:
        return TorchStep(models.add_lora(unet), None)
    return OurStep(models.add_lora(unet), cat_factor=0.0 if provider == OUR_PLAIN else 1.0)


def inputs(settings: dict[str, Any], size: int) -> list[torch.Tensor]:
    """Latents and both conditions, batch 1."""
    text = (1, models.TOKENS, settings["cross_attention_dim"])
    return [torch.randn(1, 4, size, size), torch.randn(text), torch.randn(text)]


def peak_of(provider: str, size: int, smoke: bool) -> None:
    """Runs in a process of its own: three steps, then the peak memory on the last line of the output."""
    harness.prepare(smoke)
    settings = models.config(smoke)
    step = make(provider, models.unet(settings), settings)
    arguments = inputs(settings, size)
    for _ in range(3):
        step(*arguments)
    print(json.dumps({"peak": harness.peak_memory()}))


def measure_memory(report: harness.Report, case: Case, size: int, providers: Sequence[str]) -> None:
    """The peak of each contender; a smoke run starts one process only."""
    peaks = {}
    for provider in (OURS,) if report.smoke else providers:
        command = [sys.executable, "-m", "benchmarks.step", "--peak-of", provider, "--sizes", str(size)]
        done = subprocess.run(
            command + ["--smoke"] * report.smoke, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        peaks[provider] = [json.loads(done.stdout.splitlines()[-1])["peak"] / 2**30]
        report.add(provider, case, "peak memory", "GiB", peaks[provider])
    for provider, bar in ((RECIPE, MEMORY_BAR), (ONE_MODEL, None)):
        if provider in peaks:
            report.add_ratio(f"peak memory, {size}x{size}: cat_rs / {provider}", peaks[OURS], peaks[provider], bar)
    if PLAIN in peaks:
        report.add_ratio(f"peak memory, {size}x{size}, plain LoRA: cat_rs / peft", peaks[OUR_PLAIN], peaks[PLAIN])


def flat(params: Sequence[torch.Tensor]) -> torch.Tensor:
    """All values in one float64 vector."""
    return torch.cat([param.detach().double().flatten() for param in params])


def check(steps: Mapping[str, TorchStep | OurStep], arguments: Sequence[torch.Tensor]) -> None:
    """Given noise and timesteps, the adapters after some steps are those of PyTorch."""
    start = {name: flat(step.params) for name, step in steps.items()}
    for number in range(CHECKED_STEPS):
        noise = torch.randn(arguments[0].shape)
        timesteps = torch.tensor([[100, 700][number % 2]])
        for step in steps.values():
            step(*arguments, noise=noise, timesteps=timesteps)
    for ours, theirs in ((OURS, RECIPE), (OURS, ONE_MODEL), (OUR_PLAIN, PLAIN)):
        if theirs not in steps:
            continue
        update = flat(steps[theirs].params) - start[theirs]
        difference = flat(steps[ours].params) - start[ours] - update
        error = float(difference.norm() / update.norm())
        print(f"{ours}: adapter after {CHECKED_STEPS} steps differs by {error:.2g} of its change", flush=True)
        if not error <= UPDATE_TOLERANCE:
            raise harness.BenchmarkError(
                f"{NAME}: after {CHECKED_STEPS} steps the change of the adapter of '{ours}' differs from '{theirs}' "
                f"by {error:.3g} of its norm; expected at most {UPDATE_TOLERANCE}"
            )


def measure_time(
    report: harness.Report, case: Case, settings: dict[str, Any], size: int, providers: Sequence[str], rounds: int
) -> None:
    """All contenders in turns. They share the frozen weights, but for the recipe's second model."""
    arguments = inputs(settings, size)
    unet = models.unet(settings)
    steps = {name: make(name, models.share_weights(unet, settings), settings) for name in providers}
    check(steps, arguments)
    contenders = [Contender(name, lambda step=step: step(*arguments)) for name, step in steps.items()]
    samples = harness.measure(contenders, rounds, warm_up=1, sample_seconds=0)
    report.add_times(case, samples)
    where = f"time, {size}x{size}"
    if RECIPE in samples:
        report.add_ratio(f"{where}: {RECIPE} / cat_rs", samples[RECIPE], samples[OURS], TIME_BAR)
    report.add_ratio(f"{where}: {ONE_MODEL} / cat_rs", samples[ONE_MODEL], samples[OURS])
    report.add_ratio(f"{where}, plain LoRA: peft / cat_rs", samples[PLAIN], samples[OUR_PLAIN])
    report.add_ratio(f"{where}: peft plain LoRA / our CAT step", samples[PLAIN], samples[OURS])
    report.add_ratio(f"{where}: CAT / plain LoRA, both cat_rs", samples[OURS], samples[OUR_PLAIN])
    shares = steps[OURS].shares[-rounds:]
    report.add(OURS, case, "share outside the model", "%", [100 * share for share in shares])
    low, middle, high = harness.quantiles(shares)
    report.add_value(f"share of the step outside the model, {size}x{size}: cat_rs", middle, low, high, SHARE_BAR)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    parser = harness.parser((__doc__ or "").splitlines()[0], repeats=20)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="SIZE", help=f"of latents (default: {SMALL} {LARGE})")
    parser.add_argument("--peak-of", choices=PROVIDERS, help="print the peak memory of this contender, and stop")
    options = parser.parse_args(argv)
    sizes = options.sizes or ([8] if options.smoke else [SMALL, LARGE])
    if options.peak_of is not None:
        peak_of(options.peak_of, sizes[0], options.smoke)
        return 0
    report = harness.start(NAME, "A training step of Stable Diffusion 1.5's U-Net", options, argv)
    settings = models.config(options.smoke)
    for size in sizes:
        providers, rounds = (LARGE_PROVIDERS, LARGE_ROUNDS) if size >= LARGE else (PROVIDERS, report.repeats)
        case = Case("step", "float32", f"latents 1x4x{size}x{size}, rank {models.RANK}")
        measure_memory(report, case, size, providers)
        measure_time(report, case, settings, size, providers, rounds)
    report.note(
        f"{RECIPE}: as CAT's authors train: a second U-Net as the base, one call of it and two of the adapted one, "
        "F.mse_loss, clip_grad_norm_, torch.optim.AdamW."
    )
    report.note(f"{ONE_MODEL}: the same on one U-Net, whose adapter PEFT turns off for the base's call.")
    report.note(f"{LARGE}x{LARGE}: median of {LARGE_ROUNDS} rounds.")
    report.note("peak memory: the largest resident size of a process that builds the models and takes three steps.")
    report.note("share outside the model: of a step's time, what does not pass in the model's forward and backward.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
