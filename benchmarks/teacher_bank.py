"""CatStep with a bank of base predictions in a file, and without, on Stable Diffusion 1.5's U-Net with random weights.

All contenders run in one process, taking turns, over the same frozen weights.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import cat_rs
from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender

NAME = "teacher_bank"
TIME_BAR = "<= 0.85"
DRAWS = 8
CHECKED_STEPS = 2
# Adam turns a gradient into its sign where it is small: the few elements whose gradient is rounding alone differ.
UPDATE_TOLERANCE = 1e-3
WITHOUT, PLAIN = "cat_rs, no bank", "cat_rs plain LoRA"


def build(base: torch.nn.Module, latents: torch.Tensor, cond_no_trigger: torch.Tensor, path: Path) -> Any:
    """A bank in a file, its predictions in float32 so that they can be checked."""
    return cat_rs.TeacherBank.build(
        base,
        models.scheduler(),
        latents,
        cond_no_trigger,
        draws=DRAWS,
        dtype=torch.float32,
        path=path,
        batch_size=2,
    )


def make_steps(settings: dict[str, Any], base: torch.nn.Module, bank: Any) -> dict[str, Any]:
    """The contenders' steps, each with its own adapter of the same values."""

    def step(**options: Any) -> cat_rs.CatStep:
        unet = models.add_lora(models.share_weights(base, settings))
        return cat_rs.CatStep(unet, models.scheduler(), generator=torch.Generator().manual_seed(0), **options)

    return {OURS: step(teacher_bank=bank), WITHOUT: step(), PLAIN: step(cat_factor=0.0)}


def check(steps: Mapping[str, Any], bank: Any, cond: torch.Tensor, cond_no_trigger: torch.Tensor) -> None:
    """The adapter after some steps from the bank is that of a step given the same latents, noise and timesteps."""
    with_bank, without = steps[OURS], steps[WITHOUT]
    follow = torch.Generator().manual_seed(0)
    picture = torch.zeros(1, dtype=torch.long)
    adapters = {name: models.adapter(step.model) for name, step in steps.items()}
    start = _flat(adapters[OURS])
    for _ in range(CHECKED_STEPS):
        drawn = bank.draw(picture, follow)
        with_bank(picture, cond, cond_no_trigger)
        without(drawn.latents, cond, cond_no_trigger, noise=drawn.noise, timesteps=drawn.timesteps)
    expected = _flat(adapters[WITHOUT])
    error = float((_flat(adapters[OURS]) - expected).norm() / (expected - start).norm())
    print(f"{OURS}: adapter after {CHECKED_STEPS} steps differs by {error:.2g} of its change", flush=True)
    if not error <= UPDATE_TOLERANCE:
        raise harness.BenchmarkError(
            f"{NAME}: after {CHECKED_STEPS} steps the adapter of '{OURS}' differs from '{WITHOUT}' by {error:.3g} of "
            f"its change; expected at most {UPDATE_TOLERANCE}"
        )


def _flat(params: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([param.detach().double().flatten() for param in params])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser((__doc__ or "").splitlines()[0], repeats=20).parse_args(argv)
    report = harness.start(NAME, "A training step with cached base predictions", options, argv)
    settings = models.config(options.smoke)
    size = 8 if options.smoke else 16
    latents = torch.randn(1, 4, size, size)
    text = (1, models.TOKENS, settings["cross_attention_dim"])
    cond, cond_no_trigger = torch.randn(text), torch.randn(text)
    picture = torch.zeros(1, dtype=torch.long)
    case = Case("step", "float32", f"latents {'x'.join(map(str, latents.shape))}, rank {models.RANK}")
    with tempfile.TemporaryDirectory() as folder:
        base = models.unet(settings)
        bank = build(base, latents, cond_no_trigger, Path(folder, "bank.safetensors"))
        steps = make_steps(settings, base, bank)
        check(steps, bank, cond, cond_no_trigger)
        firsts = {OURS: picture, WITHOUT: latents, PLAIN: latents}
        contenders = [
            Contender(name, lambda step=step, first=firsts[name]: step(first, cond, cond_no_trigger))
            for name, step in steps.items()
        ]
        samples = harness.measure(contenders, report.repeats, warm_up=1, sample_seconds=0)
    report.add_times(case, samples)
    report.add_ratio("time: with bank / without", samples[OURS], samples[WITHOUT], TIME_BAR)
    report.add_ratio("time: CAT with bank / plain LoRA", samples[OURS], samples[PLAIN])
    report.note(f"{OURS}: draws from a bank in a file, {DRAWS} of one picture, its predictions in float32.")
    report.note("Building the bank, one forward of the base model a draw, is not in the time.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
