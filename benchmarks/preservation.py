"""What preservation costs: four steps on Stable Diffusion 1.5's U-Net with random weights, by how the term is had."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import cat_rs
from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender
from benchmarks.step import (
    LR,
    MAX_GRAD_NORM,
    OUR_PLAIN,
    PLAIN,
    SMALL,
    UPDATE_TOLERANCE,
    WEIGHT_DECAY,
    flat,
    inputs,
    make,
)

NAME = "preservation"
EVERY = 4
SET, STORED = "cat_rs, base pictures", "cat_rs, base pictures, stored draws"
LAZY = f"cat_rs, base pictures, stored draws, every {EVERY}th step"
LAZY_BAR, PEFT_BAR = "<= 1.30", "<= 0.95"


def our_step(unet: torch.nn.Module, every: int) -> cat_rs.CatStep:
    """A CAT step with an adapter of its own."""
    options: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM}
    return cat_rs.CatStep(models.add_lora(unet), models.scheduler(), preserve_every=every, **options)


def cycle(
    step: cat_rs.CatStep,
    arguments: Sequence[torch.Tensor],
    samples: cat_rs.PreservationSamples | None,
    **given: torch.Tensor,
) -> None:
    """As many steps as the term needs to come once."""
    latents, cond, cond_no_trigger = arguments
    for _ in range(EVERY):
        step(latents, cond, cond_no_trigger, preserve=samples, **given)


def check(
    unet: Callable[[], torch.nn.Module], arguments: Sequence[torch.Tensor], stored: cat_rs.PreservationSamples
) -> None:
    """Given all draws, a stored base prediction trains the adapter that one of the step's own trains."""
    given = {"noise": torch.randn_like(arguments[0]), "timesteps": torch.tensor([400])}
    adapters = []
    for samples in (stored, stored._replace(base_pred=None)):
        step = our_step(unet(), 1)
        start = flat(list(step.trainable.values()))
        cycle(step, arguments, samples, **given)
        adapters.append(flat(list(step.trainable.values())) - start)
    error = float((adapters[0] - adapters[1]).norm() / adapters[1].norm())
    if not error <= UPDATE_TOLERANCE:
        raise harness.BenchmarkError(f"{NAME}: stored base predictions change the adapter's change by {error:.3g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser((__doc__ or "").splitlines()[0], repeats=7).parse_args(argv)
    report = harness.start(NAME, "What preservation costs", options, argv)
    settings = models.config(options.smoke)
    base = models.unet(settings)

    def unet() -> torch.nn.Module:
        return models.share_weights(base, settings)

    arguments = inputs(settings, 8 if options.smoke else SMALL)
    own = cat_rs.PreservationSamples(
        torch.randn_like(arguments[0]), noise=torch.randn_like(arguments[0]), timesteps=torch.tensor([300])
    )
    schedule = models.scheduler()
    with torch.no_grad():
        noisy = schedule.add_noise(own.latents, own.noise, own.timesteps)
        stored = own._replace(base_pred=base(noisy, own.timesteps, arguments[2], return_dict=False)[0])
    check(unet, arguments, stored)
    steps = {name: make(name, unet(), settings) for name in (PLAIN, OUR_PLAIN)}
    runs: dict[str, Callable[[], None]] = {
        name: lambda step=step: [step(*arguments) for _ in range(EVERY)] for name, step in steps.items()
    }
    for name, every, samples in ((OURS, 1, None), (SET, 1, own), (STORED, 1, stored), (LAZY, EVERY, stored)):
        runs[name] = functools.partial(cycle, our_step(unet(), every), arguments, samples)
    contenders = [Contender(name, run) for name, run in runs.items()]
    samples = harness.measure(contenders, report.repeats, warm_up=1, sample_seconds=0)
    shape = f"latents {'x'.join(map(str, arguments[0].shape))}, as many samples of the term"
    report.add_times(Case("4 steps", "float32", shape), samples)
    for name in (OURS, SET, STORED, LAZY):
        report.add_ratio(
            f"time: {name} / {OUR_PLAIN}", samples[name], samples[OUR_PLAIN], LAZY_BAR if name == LAZY else None
        )
    report.add_ratio(f"time: {LAZY} / {PLAIN}", samples[LAZY], samples[PLAIN], PEFT_BAR)
    report.note("cat_rs: CAT as its authors define it, on the concept's own latents.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
