"""What an adapter does to the pictures: scores by kind of prompts at several scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from cat_rs.adapter_check.prompts import CLASS, FALSE_TRIGGERS, GENERAL, NEIGHBOURS, TRIGGER, CheckPrompts, Kinds
from cat_rs.adapter_check.result import PictureCheck, ScaleCheck
from cat_rs.adapter_check.trigger import Trigger
from cat_rs.evaluation import Interval, KpsEvaluator, Scores
from cat_rs.evaluation.front import on_front
from cat_rs.evaluation.measures import BASE
from cat_rs.evaluation.scores import Embedded, all_kinds, score_kind, score_kind_other_seed
from cat_rs.evaluation.task import KindPictures

WITHOUT = "without the trigger"
_WITHOUT_KINDS = (GENERAL, CLASS, NEIGHBOURS)

_NONE = Interval(0.0, 0.0, 0.0)


class Drawn(NamedTuple):
    """Prompts and their pictures.

    Attributes:
        trigger: What the prompts were written from.
        prompts: The prompts.
        models: "base" or a scale -> kind -> pictures.
    """

    trigger: Trigger
    prompts: CheckPrompts
    models: Mapping[str, Mapping[str, KindPictures]]


def scale_name(scale: float) -> str:
    """Return what an adapter at a scale is called among the models."""
    return f"{scale:g}"


def score_pictures(drawn: Drawn, scales: Sequence[float], evaluator: KpsEvaluator, max_drift: float) -> PictureCheck:
    """Score an adapter's pictures.

    Args:
        drawn: The pictures of the base model and of the adapter at each scale.
        scales: The scales.
        evaluator: The encoder that embedded them.
        max_drift: The damage that is still safe.
    """
    kinds = drawn.prompts.kinds
    texts = _texts(kinds, evaluator)
    pictures = {name: _with_joined(own) for name, own in drawn.models.items()}
    base = pictures[BASE]
    scored = {
        name: {
            kind: score_kind(name, own[kind], texts.get(kind), None if name == BASE else base[kind]) for kind in own
        }
        for name, own in pictures.items()
    }
    scores = {name: {kind: figures for kind, (figures, _) in own.items()} for name, own in scored.items()}
    other_seed = {kind: score_kind_other_seed(own) for kind, own in base.items()}
    checked = _on_front([_at_scale(scale, scores[scale_name(scale)]) for scale in sorted(scales)])
    safe = [each.scale for each in checked if _highest(each.damage) <= max_drift]
    return PictureCheck(
        trigger=drawn.trigger.word,
        class_word=drawn.trigger.class_word,
        source=drawn.trigger.source,
        prompts={kind: tuple(prompt.text for prompt in prompts) for kind, prompts in kinds.items()},
        variants=tuple(prompt.variant for prompt in kinds.get(FALSE_TRIGGERS, ())),
        left_out=drawn.prompts.left_out,
        base=scores[BASE],
        other_seed={kind: figures for kind, figures in other_seed.items() if figures is not None},
        scales=checked,
        max_drift=max_drift,
        safest=max(safe, default=None),
        rows={kind: tuple(row for own in scored.values() for row in own[kind][1]) for kind in kinds},
        grids={name: {kind: each.grid for kind, each in own.items()} for name, own in drawn.models.items()},
    )


def _texts(kinds: Kinds, evaluator: KpsEvaluator) -> dict[str, torch.Tensor]:
    """Embed what each kind's prompts ask for, where an encoder knows it."""
    if not evaluator.has_text:
        return {}
    captions = {kind: [prompt.caption for prompt in prompts] for kind, prompts in kinds.items()}
    return {kind: evaluator.embed_texts(texts) for kind, texts in captions.items() if all(texts)}


def _with_joined(own: Mapping[str, KindPictures]) -> dict[str, Embedded]:
    """Return a model's pictures by kind, and those of all kinds without the trigger."""
    embedded = {kind: each.embedded for kind, each in own.items()}
    return {**embedded, WITHOUT: all_kinds([embedded[kind] for kind in _WITHOUT_KINDS if kind in embedded])}


def _at_scale(scale: float, kinds: Mapping[str, Scores]) -> ScaleCheck:
    drifts = {kind: kinds[kind].drift or _NONE for kind in _WITHOUT_KINDS if kind in kinds}
    damaged = max(drifts, key=lambda kind: _highest(drifts[kind]))
    effect = kinds[TRIGGER].drift if TRIGGER in kinds else None
    return ScaleCheck(scale, kinds, drifts[damaged], damaged, effect, False)


def _highest(drift: Interval) -> float:
    """Return the upper end of an interval, or the value where there is a single one."""
    return drift.value if math.isnan(drift.high) else drift.high


def _on_front(scales: Sequence[ScaleCheck]) -> tuple[ScaleCheck, ...]:
    """Mark the scales that no other exceeds in effect and damage; without an effect there is nothing to weigh."""
    effects = [each.effect.value for each in scales if each.effect is not None]
    if len(effects) < len(scales):
        return tuple(scales)
    flags = on_front([(effect, -each.damage.value) for effect, each in zip(effects, scales, strict=True)])
    return tuple(replace(each, on_front=flag) for each, flag in zip(scales, flags, strict=True))
