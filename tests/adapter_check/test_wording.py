"""Sentences say what was measured, and no more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cat_rs.adapter_check.prompts import CLASS, FALSE_TRIGGERS, GENERAL, NEIGHBOURS, TRIGGER
from cat_rs.adapter_check.result import PictureCheck, ScaleCheck
from cat_rs.adapter_check.wording import sentences
from cat_rs.evaluation import Interval, PromptScores, Scores

FLOOR = Interval(0.1, 0.08, 0.12)
NONE = Interval(0.0, 0.0, 0.0)
VARIANTS = ("skss", "ohwx", "sks dog")


def near(value: float, width: float = 0.002) -> Interval:
    return Interval(value, value - width, value + width)


def at_scale(scale: float, **drifts: Interval) -> ScaleCheck:
    kinds = {TRIGGER: near(0.2), GENERAL: near(0.005), CLASS: near(0.07), NEIGHBOURS: near(0.03), **drifts}
    damaged = max((GENERAL, CLASS, NEIGHBOURS), key=lambda kind: kinds[kind].value)
    scores = {kind: Scores(drift=drift) for kind, drift in kinds.items()}
    return ScaleCheck(scale, scores, kinds[damaged], damaged, kinds[TRIGGER], True)


def rows(false: tuple[float, ...] = (0.02, 0.03, 0.15)) -> dict[str, tuple[PromptScores, ...]]:
    found = [
        PromptScores("1", f"a {name} cat", False, similarity=(1.0 - drift,))
        for name, drift in zip(VARIANTS, false, strict=True)
    ]
    return {FALSE_TRIGGERS: tuple(found)}


def check(*scales: ScaleCheck, **changed: object) -> PictureCheck:
    made = scales or (at_scale(1.0),)
    return replace(
        PictureCheck(
            trigger="sks",
            class_word="cat",
            source="from a test",
            prompts={},
            variants=VARIANTS,
            left_out=(),
            base={},
            other_seed={kind: Scores(drift=FLOOR) for kind in made[0].kinds},
            scales=made,
            max_drift=0.05,
            safest=None,
            rows=rows(),
        ),
        **changed,  # type: ignore[arg-type]
    )


def text_of(found: PictureCheck) -> str:
    return " ".join(sentences(found))


@pytest.mark.parametrize(
    ("drift", "degree"),
    [
        (near(0.005), "hardly at all"),
        (near(0.03), "less than half as much as another seed would"),
        (near(0.07), "less than another seed would ("),
        (near(0.1), "about as much as another seed would"),
        (near(0.07, 0.05), "less than another seed would, though that is not certain"),
        (near(0.15, 0.05), "more than another seed would, though that is not certain"),
        (near(0.2), "more than another seed would ("),
        (Interval(0.03, math.nan, math.nan), "less than half as much as another seed would"),
    ],
)
def test_how_much_a_kind_changes(drift: Interval, degree: str) -> None:
    assert f"Without its trigger, the adapter changes 'cat' {degree}" in text_of(
        check(at_scale(1.0, **{CLASS: drift}))
    )


def test_without_another_seed_the_figure_is_said_alone() -> None:
    assert "changes 'cat' by this much (drift 0.070 [0.068, 0.072])." in text_of(check(other_seed={}))


def test_without_a_trigger_nothing_is_said_of_it() -> None:
    at = replace(at_scale(1.0), effect=None, kinds={GENERAL: Scores(drift=near(0.2))})
    text = text_of(check(at, trigger=None, class_word=None, rows={}, left_out=("No trigger is known.",)))
    assert text == (
        "On prompts that do not ask for it, the adapter changes pictures of all sorts of things more than another "
        "seed would (drift 0.200 [0.198, 0.202], another seed 0.100 [0.080, 0.120]). No trigger is known."
    )


def test_a_trigger_that_calls_nothing_is_doubted() -> None:
    assert "Is 'sks' its trigger? Source: from a test." in text_of(check(at_scale(1.0, **{TRIGGER: near(0.001)})))
    assert "Is 'sks'" not in text_of(check())


def test_a_class_that_changes_like_the_trigger_is_named() -> None:
    assert "'cat' alone changes 90% of what changes with the trigger" in text_of(
        check(at_scale(1.0, **{CLASS: near(0.18)}))
    )
    assert "alone changes" not in text_of(check())


def test_false_triggers() -> None:
    assert (
        "False triggers call little: 'skss', 'ohwx' 10% to 15% of what the trigger changes, 'cat' alone 35%."
        in text_of(check())
    )
    assert "The trigger beside another class ('sks dog') changes 75% of that." in text_of(check())
    text = text_of(check(rows=rows((0.02, 0.14, 0.15))))
    assert (
        "False triggers that change pictures as the trigger does: 'ohwx', 70% of what the trigger changes, 'cat' "
        "alone 35%." in text
    )
    # As much as the class alone changes: the false trigger adds nothing.
    at = at_scale(1.0, **{CLASS: near(0.15)})
    assert (
        "False triggers change no more than 'cat' alone may: 'skss', 'ohwx' 10% to 70% of what the trigger changes, "
        "'cat' alone 75%." in text_of(check(at, rows=rows((0.02, 0.14, 0.15))))
    )


def test_what_is_lost_is_named() -> None:
    at = at_scale(1.0)
    kinds = {**at.kinds, CLASS: replace(at.kinds[CLASS], diversity_retained=near(0.6))}
    text = text_of(check(replace(at, kinds=kinds)))
    assert "Seeds differ less on 'cat': 60% of the base model's diversity is left (0.600 [0.598, 0.602])." in text
    kinds[CLASS] = replace(at.kinds[CLASS], diversity_retained=near(0.85, 0.2))
    assert "Seeds differ" not in text_of(check(replace(at, kinds=kinds)))


@pytest.mark.parametrize(("loss", "said"), [(0.05, True), (0.001, False), (-0.05, False)])
def test_prompts_that_are_followed_less_are_named(loss: float, said: bool) -> None:
    own = [
        PromptScores(model, f"prompt {number}", False, prompt_similarity=(0.3 + number / 100 - less,))
        for model, less in (("base", 0.0), ("1", loss))
        for number in range(5)
    ]
    text = text_of(check(rows={CLASS: tuple(own)}))
    assert ("Pictures follow their prompts less on 'cat': the cosine to the prompt changes by -0.050" in text) == said


def test_the_safest_scale_is_named() -> None:
    half = at_scale(0.5, **{TRIGGER: near(0.12), CLASS: near(0.04)})
    scales = (half, at_scale(1.0))
    assert (
        "The largest scale tried whose drift without the trigger stays under 0.05 is 0.5, with 60% of the trigger's "
        "effect at 1 (drift 0.040 [0.038, 0.042] on 'cat')." in text_of(check(*scales, safest=0.5))
    )
    text = text_of(check(*scales, max_drift=0.01))
    assert (
        "At no scale tried does the interval of drift without the trigger stay under 0.01: the least is 0.040" in text
    )
    assert "scale tried" not in text_of(check(at_scale(1.0)))
