"""Weights of the preservation term that change while training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cat_rs import CatFactorRamp, CatFactorRatio, CatStep
from cat_rs.errors import InvalidValueError
from tests.models import add_lora, batch, lora_parameters, tiny_unet


def make_step(cat_factor: Any, **settings: Any) -> CatStep:
    from diffusers import DDPMScheduler

    return CatStep(add_lora(tiny_unet()), DDPMScheduler(), lr=1e-2, cat_factor=cat_factor, **settings)


def test_a_ramp_goes_from_start_to_end_and_stays() -> None:
    linear = CatFactorRamp(0.5, 2.5, 4)
    assert [linear(step) for step in range(7)] == [0.5, 1.0, 1.5, 2.0, 2.5, 2.5, 2.5]
    cosine = CatFactorRamp(2.0, 0.0, 4, "cosine")
    assert [cosine(step) for step in range(6)] == pytest.approx(
        [1 + math.cos(math.pi * n / 4) for n in range(5)] + [0]
    )


def test_a_step_with_a_ramp_is_a_step_with_its_values() -> None:
    ramp = CatFactorRamp(0.0, 3.0, 2)
    ramped, by_hand = make_step(ramp, accumulate=2), make_step(0.0, accumulate=2)
    for number in range(8):
        by_hand.cat_factor = ramp(number // 2)
        ours, theirs = ramped(**batch(number)), by_hand(**batch(number))
        assert float(ours.cat_factor) == ramp(number // 2)
        assert torch.equal(ours.loss, theirs.loss)
    assert ramped.steps_done == 4
    ours, theirs = lora_parameters(ramped.model), lora_parameters(by_hand.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_any_function_of_the_step_will_do() -> None:
    step = make_step(lambda done: 1.0 / (1 + done))
    assert [float(step(**batch(number)).cat_factor) for number in range(3)] == pytest.approx([1, 1 / 2, 1 / 3])


def test_a_ratio_without_memory_puts_the_term_at_the_fraction() -> None:
    ratio = CatFactorRatio(0.25, decay=0)
    assert ratio(0) == 1000
    ratio.update(2.0, 0.1)
    assert ratio(1) * 0.1 == pytest.approx(0.25 * 2.0)
    ratio.update(2.0, 0.0)
    assert ratio(2) == 1000


def test_a_ratio_follows_decaying_means() -> None:
    ratio = CatFactorRatio(0.5, decay=0.75)
    terms = [(1.0, 0.3), (3.0, 0.2), (2.0, 0.9)]
    for diffusion, cat in terms:
        ratio.update(diffusion, cat)
    weights = [0.75**2, 0.75, 1]
    means = [sum(w * term[n] for w, term in zip(weights, terms, strict=True)) for n in range(2)]
    assert ratio(3) == pytest.approx(0.5 * means[0] / means[1])
    ratio.update(math.nan, 1.0)
    ratio.update(1.0, math.inf)
    assert ratio(4) == pytest.approx(0.5 * means[0] / means[1])


def test_a_step_keeps_the_ratio() -> None:
    ratio = CatFactorRatio(0.2, maximum=50.0, decay=0.5)
    step, twin = make_step(ratio), CatFactorRatio(0.2, maximum=50.0, decay=0.5)
    for number in range(6):
        metrics = step(**batch(number))
        assert float(metrics.cat_factor) == pytest.approx(twin(number))
        twin.update(float(metrics.diffusion), float(metrics.cat))


@pytest.mark.parametrize(
    "make", [lambda: CatFactorRatio(0.2), lambda: CatFactorRamp(0.0, 1.0, 3)], ids=["ratio", "ramp"]
)
def test_a_resumed_step_goes_on_bit_for_bit(make: Callable[[], Any]) -> None:
    step = make_step(make())
    for number in range(2):
        step(**batch(number))
    resumed = make_step(make())
    resumed.load_state_dict(step.state_dict())
    for number in range(2, 4):
        ours, theirs = resumed(**batch(number)), step(**batch(number))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "negative": (lambda: make_step(-1.0), r"CatStep: `cat_factor` must be a finite number >= 0, got -1.0"),
    "function": (lambda: make_step(lambda done: math.nan)(**batch(0)), "CatStep: `cat_factor` .* got nan"),
    "ramp-start": (lambda: CatFactorRamp(-1.0, 1.0, 3), "`start` must be a finite number >= 0, got -1.0"),
    "ramp-steps": (lambda: CatFactorRamp(0.0, 1.0, 0), "CatFactorRamp: `steps` must be at least 1, got 0"),
    "ramp-shape": (lambda: CatFactorRamp(0.0, 1.0, 2, "flat"), "`shape` must be 'linear' or 'cosine', got 'flat'"),  # type: ignore[arg-type]
    "ratio": (lambda: CatFactorRatio(0.0), "CatFactorRatio: `ratio` must be a finite number > 0, got 0.0"),
    "maximum": (lambda: CatFactorRatio(1.0, maximum=math.inf), "`maximum` must be a finite number > 0, got inf"),
    "decay": (lambda: CatFactorRatio(1.0, decay=1.0), r"`decay` must be in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize(("make", "text"), [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_values_are_named(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(InvalidValueError, match=text):
        make()
