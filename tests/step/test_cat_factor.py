"""Weights of the preservation term that change while training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cat_rs import CatFactorRamp, CatFactorRatio, CatFactorTarget, CatStep
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
    # Means of the terms themselves, which begin at zero.
    assert ratio.state_dict() == pytest.approx({"diffusion": 0.25 * means[0], "cat": 0.25 * means[1]})


def test_a_step_keeps_the_ratio() -> None:
    ratio = CatFactorRatio(0.2, maximum=50.0, decay=0.5)
    step, twin = make_step(ratio), CatFactorRatio(0.2, maximum=50.0, decay=0.5)
    for number in range(6):
        metrics = step(**batch(number))
        assert float(metrics.cat_factor) == pytest.approx(twin(number))
        twin.update(float(metrics.diffusion), float(metrics.cat))


def expected_factors(terms: list[tuple[float, float]], drift: float, **settings: float) -> list[float]:
    """A target's factors after each of the terms, as the rule reads."""
    defaults = {"start": 1.0, "minimum": 0.1, "maximum": 100.0, "rate": 0.05, "decay": 0.9}
    start, low, high, rate, decay = (defaults | settings).values()
    factors, means = [start], [0.0, 0.0]
    for term in terms:
        means = [decay * mean + (1 - decay) * value for mean, value in zip(means, term, strict=True)]
        error = min(max(means[1] / means[0] / drift - 1, -1), 1)
        factors.append(min(max(factors[-1] * (1 + rate * error), low), high))
    return factors[1:]


@pytest.mark.parametrize(
    "settings",
    [{}, {"start": 3.0, "minimum": 2.9, "maximum": 3.1}, {"rate": 0.5, "decay": 0.0}, {"drift": 10.0, "rate": 0.9}],
    ids=["default", "bounds", "fast", "below"],
)
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_a_target_rises_above_its_drift_and_falls_below(settings: dict[str, float], tensors: bool) -> None:
    settings = {"drift": 0.05, **settings}
    terms = [(0.5, 0.0), (0.4, 0.01), (0.3, 0.02), (0.35, 0.4), (0.3, 0.2), (0.2, 0.001)]
    target = CatFactorTarget(**settings)
    factors = [target(0)]
    for number, term in enumerate(terms):
        target.update(*(map(torch.tensor, term) if tensors else term))
        factors.append(target(number))
    expected = [settings.get("start", 1.0), *expected_factors(terms, **settings)]
    assert factors == pytest.approx(expected, rel=1e-6)
    assert len(set(factors)) > 1


def test_a_target_leaves_out_what_is_not_finite_and_what_says_nothing() -> None:
    target = CatFactorTarget(0.1)
    for terms in ((math.nan, 1.0), (1.0, math.inf), (0.0, 0.0)):
        target.update(*terms)
        assert target(0) == 1.0
    target.update(0.0, 1.0)
    assert target(0) == 1.05


def test_the_scale_of_the_terms_does_not_matter_to_a_target() -> None:
    ours, theirs = CatFactorTarget(0.1), CatFactorTarget(0.1)
    for diffusion, cat in ((0.3, 0.01), (0.2, 0.1), (0.25, 0.05)):
        ours.update(diffusion, cat)
        theirs.update(1024 * diffusion, 1024 * cat)
        assert ours(0) == theirs(0) != 1.0


def test_a_step_follows_its_target() -> None:
    step = make_step(CatFactorTarget(1e-3, rate=0.5))
    terms, factors = [], []
    for number in range(6):
        assert step.preserves_next
        metrics = step(**batch(number))
        terms.append((float(metrics.diffusion), float(metrics.cat)))
        factors.append(float(metrics.cat_factor))
    assert factors == pytest.approx([1.0, *expected_factors(terms[:-1], 1e-3, rate=0.5)])


def test_a_target_holds_the_drift() -> None:
    def drift(cat_factor: Any) -> float:
        step = make_step(cat_factor)
        terms = [step(**batch(number % 3)) for number in range(160)][-30:]
        return float(sum(one.cat for one in terms) / sum(one.diffusion for one in terms))

    free = drift(1e-3)
    held = drift(CatFactorTarget(free / 4, minimum=0.01, rate=0.1, decay=0.8))
    assert held == pytest.approx(free / 4, rel=0.4)


FOLLOWING = [lambda: CatFactorRatio(0.2), lambda: CatFactorTarget(1e-3, rate=0.5)]


@pytest.mark.parametrize("make", FOLLOWING, ids=["ratio", "target"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_factor_follows_whole_optimizer_steps(make: Callable[[], Any], every: int) -> None:
    # Both halves of a batch, one after the other, are the batch.
    halves, whole = make_step(make(), accumulate=2, preserve_every=every), make_step(make(), preserve_every=every)
    seen: list[set[float]] = []
    for number in range(6):
        one = batch(number, 4)
        parts = [halves(**{name: value[part] for name, value in one.items()}) for part in (slice(0, 2), slice(2, 4))]
        theirs = whole(**one)
        seen.append({float(part.cat_factor) for part in parts})
        assert parts[0].cat_factor == pytest.approx(float(theirs.cat_factor), rel=1e-4)
    assert all(len(factors) == 1 for factors in seen)
    assert len(set.union(*seen)) == 6 // every


@pytest.mark.parametrize("make", [*FOLLOWING, lambda: CatFactorRamp(0.0, 1.0, 3)], ids=["ratio", "target", "ramp"])
@pytest.mark.parametrize("before", [2, 3], ids=["between", "within-an-accumulation"])
def test_a_resumed_step_goes_on_bit_for_bit(make: Callable[[], Any], before: int) -> None:
    step, resumed = (make_step(make(), accumulate=2) for _ in range(2))
    for number in range(before):
        step(**batch(number))
    for number in range(3):
        resumed(**batch(50 + number))
    resumed.load_state_dict(step.state_dict())
    for number in range(before, 7):
        ours, theirs = resumed(**batch(number)), step(**batch(number))
        assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(ours, theirs, strict=True))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "negative": (lambda: make_step(-1.0), r"CatStep: `cat_factor` must be a finite number >= 0, got -1.0"),
    "function": (lambda: make_step(lambda done: math.nan)(**batch(0)), "CatStep: `cat_factor` .* got nan"),
    "ramp-start": (lambda: CatFactorRamp(-1.0, 1.0, 3), "`start` must be a finite number >= 0, got -1.0"),
    "ramp-steps": (lambda: CatFactorRamp(0.0, 1.0, 0), "CatFactorRamp: `steps` must be at least 1, got 0"),
    "ramp-shape": (lambda: CatFactorRamp(0.0, 1.0, 2, "flat"), "`shape` must be 'linear' or 'cosine', got 'flat'"),  # type: ignore[arg-type]
    "ratio": (lambda: CatFactorRatio(0.0), "CatFactorRatio: `ratio` must be a finite number > 0, got 0.0"),
    "drift": (lambda: CatFactorTarget(0.0), "CatFactorTarget: `drift` must be a finite number > 0, got 0.0"),
    "start": (lambda: CatFactorTarget(0.1, start=200.0), r"`start` must be in \[0.1, 100\], got 200.0"),
    "bounds": (lambda: CatFactorTarget(0.1, minimum=2.0, maximum=1.0), r"`start` must be in \[2, 1\], got 1.0"),
    "rate": (lambda: CatFactorTarget(0.1, rate=1.0), r"`rate` must be in \(0, 1\), got 1.0"),
    "target-decay": (lambda: CatFactorTarget(0.1, decay=1.0), r"CatFactorTarget: `decay` must be in \[0, 1\)"),
    "maximum": (lambda: CatFactorRatio(1.0, maximum=math.inf), "`maximum` must be a finite number > 0, got inf"),
    "decay": (lambda: CatFactorRatio(1.0, decay=1.0), r"`decay` must be in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize(("make", "text"), [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_values_are_named(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(InvalidValueError, match=text):
        make()
