"""Noisy latents, target and doubled batch: diffusers' scheduler with torch.cat, and cat_rs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product

import torch
from tests import references

from benchmarks import harness, models
from benchmarks.harness import OURS, Case, Contender
from cat_rs.ops.noising import noising
from cat_rs.step.noise_schedule import NoiseSchedule

NAME = "noising"
COPIES = 2

Result = tuple[torch.Tensor, torch.Tensor]


def run(shape: tuple[int, ...], prediction_type: str, report: harness.Report) -> None:
    """One shape and one kind of target."""
    scheduler = models.scheduler()
    schedule = NoiseSchedule(scheduler, prediction_type)
    latents, noise = torch.randn(shape), torch.randn(shape)
    timesteps = torch.randint(len(scheduler.alphas_cumprod), (shape[0],))

    def diffusers_way() -> Result:
        noisy = scheduler.add_noise(latents, noise, timesteps)
        velocity = prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        return torch.cat([noisy, noisy]), target

    def our_way() -> Result:
        # The look-up of the rates belongs to the operation: the scheduler does it too.
        return noising(latents, noise, *schedule.rates(timesteps, shape[0]), prediction_type, copies=COPIES)

    ways: dict[str, Callable[[], Result]] = {"diffusers": diffusers_way, OURS: our_way}
    signal = scheduler.alphas_cumprod[timesteps].double()
    noisy, target = references.noising(latents, noise, signal.sqrt(), (1 - signal).sqrt(), prediction_type)
    for name, way in ways.items():
        doubled, got = way()
        harness.check_close(f"{NAME} {name} z_t {shape}", doubled, torch.cat([noisy, noisy]), 1e-5)
        harness.check_close(f"{NAME} {name} target {shape}", got, target, 1e-5)

    # Latents and noise are read, both copies written; a velocity target too, an epsilon target is the noise itself.
    written = COPIES + (prediction_type == "v_prediction")
    moved = (2 + written) * latents.nbytes
    copy = harness.copy_contender(moved)
    samples = harness.measure([*(Contender(name, way) for name, way in ways.items()), copy], report.repeats)
    case = Case(prediction_type, "float32", str(shape).replace(" ", ""))
    report.add_times(case, {name: samples[name] for name in ways})
    report.add_bandwidth(case, moved, {name: samples[name] for name in (OURS, copy.name)})
    report.add_ratio(f"diffusers / cat_rs, {prediction_type}, {case.shape}", samples["diffusers"], samples[OURS])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    options = harness.parser(__doc__ or "", repeats=100).parse_args(argv)
    report = harness.start(NAME, "Noisy latents, target and doubled student batch", options, argv)
    for prediction_type, shape in product(("epsilon", "v_prediction"), models.latent_shapes(options.smoke)):
        run(shape, prediction_type, report)
    report.note("diffusers: add_noise, get_velocity where the target is a velocity, torch.cat of z_t with itself.")
    report.note("copy: torch's copy of as many bytes as must move, half of them read and half written.")
    return harness.finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
