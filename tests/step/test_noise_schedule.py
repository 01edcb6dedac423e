"""Timesteps are drawn from the whole of a schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cat_rs.step.noise_schedule import NoiseSchedule

STEPS = 7


def schedulers() -> list[Any]:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    return [
        DDPMScheduler(num_train_timesteps=STEPS),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS, shift=3.0),
    ]


@pytest.mark.parametrize("number", range(3), ids=["ddpm", "flow matching", "shifted"])
def test_every_timestep_is_drawn_equally_often(number: int) -> None:
    scheduler = schedulers()[number]
    schedule = NoiseSchedule(scheduler)
    drawn, counts = schedule.draw(7000, torch.Generator().manual_seed(0)).unique(return_counts=True)
    assert sorted(drawn.tolist()) == sorted(scheduler.timesteps.tolist())
    # Within five standard deviations of 1000.
    assert all(abs(count - 1000) < 150 for count in counts.tolist())
    schedule.rates(drawn, len(drawn))
