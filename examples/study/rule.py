"""Which adapter of plain LoRA stands beside ours. Written down before the run.

Half of the prompts choose, the other half are scored: in each kind of prompts, and in those with the trigger, every
second one. Our adapter is the checkpoint that `cat-rs train --evaluate-every` calls the best. Plain LoRA's is the one
with the highest UPS of all its checkpoints and scales whose identity is at least ours - 0.01; where there is none, the
one of the highest identity. The other rules stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import cat_rs
from cat_rs.evaluation import EvaluationResult
from cat_rs.evaluation.front import choose_best
from cat_rs.training import TrainConfig
from concepts import Concept
from methods import METHODS, PLAIN, adapter_name

EVALUATE_KEEP = TrainConfig.__dataclass_fields__["evaluate_keep"].default


class Figures(NamedTuple):
    """Two figures of an adapter over some prompts."""

    identity: float
    ups: float


class Match(NamedTuple):
    """Two adapters, and ours minus plain LoRA's on the scored prompts."""

    ours: str
    plain: str
    identity: float
    ups: float


Chooser = Callable[[Figures, Mapping[str, Figures]], str | None]


def _highest_ups(names: Sequence[str], plain: Mapping[str, Figures]) -> str:
    fallback = max(plain, key=lambda name: plain[name].identity)
    return max(names, key=lambda name: plain[name].ups, default=fallback)


def _best_above(margin: float, scales: Sequence[float] | None = None) -> Chooser:
    def choose(ours: Figures, plain: Mapping[str, Figures]) -> str:
        allowed = {name: plain[name] for name in _names(scales) if name in plain}
        return _highest_ups([name for name in allowed if allowed[name].identity >= ours.identity - margin], allowed)

    return choose


def _nearest(ours: Figures, plain: Mapping[str, Figures]) -> str | None:
    name = min(plain, key=lambda name: abs(plain[name].identity - ours.identity))
    return name if abs(plain[name].identity - ours.identity) <= 0.02 else None


def _earliest(ours: Figures, plain: Mapping[str, Figures]) -> str | None:
    return next((name for name in _names([1.0]) if abs(plain[name].identity - ours.identity) <= 0.02), None)


def _names(scales: Sequence[float] | None) -> list[str]:
    method = METHODS[PLAIN]
    return [adapter_name(PLAIN, step, scale) for step in method.kept for scale in scales or method.scales]


RULES: dict[str, Chooser] = {
    "any checkpoint, any scale, identity >= ours - 0.01": _best_above(0.01),
    "any checkpoint, any scale, identity >= ours - 0.02": _best_above(0.02),
    "any checkpoint at scale 1, identity >= ours - 0.01": _best_above(0.01, [1.0]),
    "nearest identity within 0.02": _nearest,
    "earliest checkpoint within 0.02": _earliest,
}


def match(
    result: EvaluationResult,
    concept: Concept,
    method: str,
    rule: Chooser,
    judged: EvaluationResult | None = None,
    without: Set[str] = frozenset(),
) -> Match | None:
    """Our adapter and plain LoRA's in one run; None where the rule finds none.

    `judged` scores the adapters that `result` chooses; `without` leaves prompts out of both.
    """
    choosing, scored = (
        figures(each, half_of(concept, half) - without) for half, each in enumerate((result, judged or result))
    )
    own = [name for name in METHODS[method].adapters_at_full_scale() if name in choosing]
    best = choose_best([choosing[name] for name in own], result.base.identity, EVALUATE_KEEP)
    if best is None:
        return None
    ours = own[best]
    plain = rule(choosing[ours], {name: choosing[name] for name in _names(None)})
    if plain is None:
        return None
    return Match(ours, plain, scored[ours].identity - scored[plain].identity, scored[ours].ups - scored[plain].ups)


def half_of(concept: Concept, half: int) -> set[str]:
    """Every second prompt of each kind, from the first or the second on."""
    groups: Iterable[Sequence[str]] = (concept.trigger_prompts, *concept.kinds.values())
    return {prompt for group in groups for prompt in group[half::2]}


def figures(result: EvaluationResult, prompts: set[str]) -> dict[str, Figures]:
    """The figures of every adapter over some of the prompts."""
    identities: dict[str, list[float]] = {}
    similarities: dict[str, list[float]] = {}
    for row in result.prompts:
        if row.prompt in prompts and row.model in result.adapters:
            if row.trigger:
                identities.setdefault(row.model, []).extend(row.identity)
            else:
                similarities.setdefault(row.model, []).extend(row.similarity)
    return {
        name: Figures(sum(values) / len(values), cat_rs.harmonic_mean(similarities[name]))
        for name, values in identities.items()
    }
