"""What a check found, in sentences that a person understands; each says its figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from cat_rs.adapter_check.pictures import WITHOUT, scale_name
from cat_rs.adapter_check.prompts import CLASS, EMPTY, FALSE_TRIGGERS, GENERAL, NEIGHBOURS, TRIGGER
from cat_rs.adapter_check.result import PictureCheck, ScaleCheck
from cat_rs.evaluation import Interval, PromptScores
from cat_rs.evaluation.measures import BASE, format_interval, prompt_values
from cat_rs.evaluation.scores import Paired, paired_interval

# Shares of what another seed changes.
_HARDLY = 0.1
_HALF = 0.5
_ALIKE = (0.8, 1.25)
_NOTHING = "hardly at all"
# What is worth a sentence.
_LEAST_LOSS = 0.1
_LEAST_COSINE = 0.01
# A drift of rounding.
_NO_EFFECT = 1e-4
# A false trigger that has this share of the trigger's effect is answered to.
_LEAK = 0.5
_CLASS_SHARE = 0.8


def sentences(check: PictureCheck) -> tuple[str, ...]:
    """Return what a person should know of an adapter's pictures, at the scale that is nearest to 1."""
    at = min(check.scales, key=lambda each: abs(each.scale - 1.0))
    return (
        *_with_trigger(check, at),
        *_changes(check, at),
        *_losses(check, at),
        *_false_triggers(check, at),
        *_strength(check, at),
        *check.left_out,
    )


def _with_trigger(check: PictureCheck, at: ScaleCheck) -> Iterator[str]:
    if at.effect is None:
        return
    degree = _degree(at.effect, _floor(check, TRIGGER))
    yield f"With its trigger {check.trigger!r}, the adapter changes pictures {degree} ({_drifts(check, at, TRIGGER)})."
    if degree == _NOTHING:
        yield f"Is {check.trigger!r} its trigger? Source: {check.source}."
    own_class = at.kinds[CLASS].drift if CLASS in at.kinds else None
    if own_class is not None and _calls(check, at) and own_class.value >= _CLASS_SHARE * at.effect.value:
        yield (
            f"{check.class_word!r} alone changes {_percent(own_class, at.effect)} of what changes with the trigger: "
            "the trigger sets little apart."
        )


def _changes(check: PictureCheck, at: ScaleCheck) -> Iterator[str]:
    """How much pictures change that nobody asked to change."""
    without = "Without its trigger" if check.trigger else "On prompts that do not ask for it"
    for kind in at.kinds:
        drift = at.kinds[kind].drift
        if kind not in (TRIGGER, FALSE_TRIGGERS, WITHOUT) and drift is not None:
            degree = _degree(drift, _floor(check, kind))
            yield f"{without}, the adapter changes {_what(check, kind)} {degree} ({_drifts(check, at, kind)})."


def _losses(check: PictureCheck, at: ScaleCheck) -> Iterator[str]:
    """Where pictures differ less from one another, or follow their prompts less, than the base model's."""
    for kind in at.kinds:
        retained = at.kinds[kind].diversity_retained
        named = kind not in (FALSE_TRIGGERS, WITHOUT)
        if named and retained and retained.value < 1.0 - _LEAST_LOSS and _bound(retained, retained.high) < 1.0:
            yield (
                f"Seeds differ less on {_what(check, kind)}: {retained.value:.0%} of the base model's diversity is "
                f"left ({format_interval(retained)})."
            )
        change = _prompt_similarity_change(check.rows.get(kind, ()), scale_name(at.scale))
        if change is not None and change.value < -_LEAST_COSINE and _bound(change, change.high) < 0.0:
            yield (
                f"Pictures follow their prompts less on {_what(check, kind)}: the cosine to the prompt changes by "
                f"{format_interval(change, '+')}."
            )


def _false_triggers(check: PictureCheck, at: ScaleCheck) -> Iterator[str]:
    """Which words call the adapter that should not."""
    if at.effect is None or FALSE_TRIGGERS not in check.rows or not _calls(check, at):
        return
    rows = [row for row in check.rows[FALSE_TRIGGERS] if row.model == scale_name(at.scale)]
    shares: dict[str, list[float]] = {}
    for variant, row in zip(check.variants, rows, strict=True):
        shares.setdefault(variant, []).append((1.0 - float(np.mean(row.similarity))) / at.effect.value)
    means = {variant: float(np.mean(values)) for variant, values in shares.items() if variant}
    own_class = at.kinds[CLASS].drift if CLASS in at.kinds else None
    usual = 0.0 if own_class is None else _bound(own_class, own_class.high) / at.effect.value
    beside = [variant for variant in means if variant.startswith(f"{check.trigger} ")]
    false = [variant for variant in means if variant not in beside]
    answered = [variant for variant in false if means[variant] >= max(_LEAK, usual)]
    own = "" if own_class is None else f", {check.class_word!r} alone {_percent(own_class, at.effect)}"
    if answered:
        yield (
            f"False triggers that change pictures as the trigger does: {_listed(answered)}, "
            f"{_shares(means, answered)} of what the trigger changes{own}."
        )
    elif false:
        within = own_class is not None and max(means[variant] for variant in false) >= _LEAK
        what = f"change no more than {check.class_word!r} alone may" if within else "call little"
        yield f"False triggers {what}: {_listed(false)} {_shares(means, false)} of what the trigger changes{own}."
    if beside:
        yield f"The trigger beside another class ({_listed(beside)}) changes {_shares(means, beside)} of that."


def _strength(check: PictureCheck, at: ScaleCheck) -> Iterator[str]:
    """How strong the adapter may be."""
    if len(check.scales) == 1:
        return
    bound = f"{check.max_drift:g}"
    if check.safest is None:
        least = min(check.scales, key=lambda each: each.damage.value)
        yield (
            f"At no scale tried does the interval of drift without the trigger stay under {bound}: the least is "
            f"{format_interval(least.damage)} at {least.scale:g}, on {_what(check, least.damaged)}."
        )
        return
    safest = next(each for each in check.scales if each.scale == check.safest)
    effect = ""
    if safest.effect and at.effect and _calls(check, at) and safest is not at:
        effect = f", with {safest.effect.value / at.effect.value:.0%} of the trigger's effect at {at.scale:g}"
    yield (
        f"The largest scale tried whose drift without the trigger stays under {bound} is {safest.scale:g}{effect} "
        f"(drift {format_interval(safest.damage)} on {_what(check, safest.damaged)})."
    )


def _calls(check: PictureCheck, at: ScaleCheck) -> bool:
    """Return whether the trigger does anything of which shares can be said."""
    effect = at.effect
    return effect is not None and effect.value > _NO_EFFECT and _degree(effect, _floor(check, TRIGGER)) != _NOTHING


def _degree(drift: Interval, floor: Interval | None) -> str:
    """How much this drift is, beside that of the base model with another seed."""
    if floor is None or floor.value <= 0.0:
        return "by this much"
    high = _bound(drift, drift.high)
    if high <= _HARDLY * floor.value:
        return _NOTHING
    if high < _HALF * floor.value:
        return "less than half as much as another seed would"
    if high < _bound(floor, floor.low):
        return "less than another seed would"
    if _bound(drift, drift.low) > _bound(floor, floor.high):
        return "more than another seed would"
    if _ALIKE[0] <= drift.value / floor.value <= _ALIKE[1]:
        return "about as much as another seed would"
    return f"{'less' if drift.value < floor.value else 'more'} than another seed would, though that is not certain"


def _drifts(check: PictureCheck, at: ScaleCheck, kind: str) -> str:
    floor = _floor(check, kind)
    beside = "" if floor is None else f", another seed {format_interval(floor)}"
    return f"drift {format_interval(at.kinds[kind].drift)}{beside}"


def _floor(check: PictureCheck, kind: str) -> Interval | None:
    return check.other_seed[kind].drift if kind in check.other_seed else None


def _what(check: PictureCheck, kind: str) -> str:
    """What the prompts of a kind ask for."""
    return {
        TRIGGER: f"{check.trigger!r}",
        GENERAL: "pictures of all sorts of things",
        CLASS: f"{check.class_word!r}",
        NEIGHBOURS: f"what is near {check.class_word!r}",
        EMPTY: "pictures without a prompt",
        FALSE_TRIGGERS: "false triggers",
    }.get(kind, f"the prompts of the kind {kind!r}")


def _prompt_similarity_change(rows: Sequence[PromptScores], model: str) -> Interval | None:
    """Return by how much more a model's pictures are like their prompts than the base model's."""
    sides = [[prompt_values(row, "prompt_similarity") for row in rows if row.model == name] for name in (BASE, model)]
    if not any(values for side in sides for values in side):
        return None
    prompts = [number for number, values in enumerate(sides[0]) for _ in values]
    base, own = (np.array([value for values in side for value in values]) for side in sides)
    return paired_interval(Paired(base, own, np.array(prompts)), "mean")


def _bound(interval: Interval, bound: float) -> float:
    """Return a bound, or the value where there is a single one."""
    return interval.value if math.isnan(bound) else bound


def _shares(means: dict[str, float], names: Sequence[str]) -> str:
    low, high = (f"{bound(means[name] for name in names):.0%}" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


def _percent(part: Interval, whole: Interval) -> str:
    return f"{part.value / whole.value:.0%}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
