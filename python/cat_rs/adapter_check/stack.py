"""Several adapters at once: what each keeps of its effect, and what they damage together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cat_rs.adapter_check.prompts import GENERAL
from cat_rs.adapter_check.result import Stack, StackCheck, StackedAdapter
from cat_rs.evaluation import Interval, ScaledAdapter
from cat_rs.evaluation.measures import BASE, format_interval
from cat_rs.evaluation.scores import (
    Embedded,
    Paired,
    by_prompt,
    interval_of,
    paired_interval,
    paired_similarity,
    ratio_of,
)
from cat_rs.evaluation.task import KindPictures, Models
from cat_rs.ops.similarity import cross_similarity

Values = NDArray[np.float64]
Pictures = Mapping[str, Mapping[str, Embedded]]
"""Model -> kind of prompts -> pictures."""


class Reference(NamedTuple):
    """What a concept looks like.

    Attributes:
        embeddings: [C, D], of its pictures.
        threshold: The mean cosine to them above which the concept appears in a picture: half way between the base
            model's pictures for the same prompts and the concept's own pictures, each against the others.
    """

    embeddings: torch.Tensor
    threshold: float


def trigger_kind(name: str) -> str:
    """Return the kind of the prompts that call an adapter."""
    return f"trigger of {name}"


def stacked_models(adapters: Mapping[str, ScaledAdapter]) -> dict[str, tuple[str, ...]]:
    """Return the stacks by name -> the adapters in it: all pairs, and the whole."""
    sizes = sorted({2, len(adapters)})
    return {" + ".join(names): names for size in sizes for names in combinations(adapters, size)}


def all_models(adapters: Mapping[str, ScaledAdapter]) -> Models:
    """Return the base model, each adapter alone, and every stack."""
    alone = {name: (adapter,) for name, adapter in adapters.items()}
    stacks = {stack: tuple(adapters[name] for name in names) for stack, names in stacked_models(adapters).items()}
    return {BASE: (), **alone, **stacks}


def score_stacks(
    adapters: Mapping[str, ScaledAdapter],
    drawn: Mapping[str, Mapping[str, KindPictures]],
    concepts: Mapping[str, torch.Tensor],
) -> StackCheck:
    """Score every stack.

    Args:
        adapters: The adapters at their scales, by name.
        drawn: The pictures of all models: general prompts, and the prompts that call each adapter with a trigger.
        concepts: Adapter -> embeddings of its concept's pictures, [C, D]; where there are none, the adapter's own
            pictures when it is alone stand for them.
    """
    pictures = {model: {kind: each.embedded for kind, each in own.items()} for model, own in drawn.items()}
    called = [name for name in adapters if trigger_kind(name) in pictures[BASE]]
    references = {name: _reference(pictures, name, concepts.get(name)) for name in called}
    stacks = []
    for stack, names in stacked_models(adapters).items():
        worst = max(names, key=lambda name: float(_drifts(pictures, name).mean()))
        stacks.append(
            Stack(
                name=stack,
                members=tuple(_member(pictures, stack, names, name, adapters[name], references) for name in names),
                drift=interval_of(_drifts(pictures, stack)),
                worst=worst,
                added=_added(_drifts(pictures, worst), _drifts(pictures, stack)),
            )
        )
    return StackCheck(
        scales={name: adapter.scale for name, adapter in adapters.items()},
        prompts={kind: each.grid.prompts for kind, each in drawn[BASE].items()},
        by_concept=tuple(name for name in called if name in concepts),
        stacks=tuple(stacks),
        findings=tuple(sentence for stack in stacks for sentence in _sentences(stack)),
        grids={model: {kind: each.grid for kind, each in own.items()} for model, own in drawn.items()},
    )


def effect_kept(base: Embedded, alone: Embedded, stacked: Embedded) -> Interval | None:
    """Return the share of an adapter's effect that is in a stack's pictures.

    With unit embeddings e of a picture by the base model, the adapter alone and the stack, it is
    mean((e_stack - e_base) . (e_alone - e_base)) / mean(|e_alone - e_base|^2): 1 if the stack moves the pictures the
    whole way that the adapter does, 0 if not at all.
    """
    unit = [torch.nn.functional.normalize(each.embeddings.double(), dim=1) for each in (base, alone, stacked)]
    own, both = unit[1] - unit[0], unit[2] - unit[0]
    return ratio_of(by_prompt((both * own).sum(1), base), by_prompt(own.square().sum(1), base))


def _member(
    pictures: Pictures,
    stack: str,
    names: Sequence[str],
    name: str,
    adapter: ScaledAdapter,
    references: Mapping[str, Reference],
) -> StackedAdapter:
    """Score one adapter of a stack; without a trigger nothing is known of its effect."""
    if name not in references:
        return StackedAdapter(name, adapter.scale, None, None, None, None)
    kind, reference = trigger_kind(name), references[name]
    base, alone, stacked = (pictures[model][kind] for model in (BASE, name, stack))
    others = [
        _appears(pictures[stack][trigger_kind(other)], reference)
        for other in names
        if other != name and other in references
    ]
    return StackedAdapter(
        name,
        adapter.scale,
        kept=effect_kept(base, alone, stacked),
        appears=interval_of(_appears(stacked, reference)),
        appears_alone=interval_of(_appears(alone, reference)),
        intrudes=interval_of(np.concatenate(others)) if others else None,
    )


def _reference(pictures: Pictures, name: str, concept: torch.Tensor | None) -> Reference:
    kind = trigger_kind(name)
    embeddings = pictures[name][kind].embeddings if concept is None else concept
    count = len(embeddings)
    # Each is among those that it is compared with, at cosine 1.
    own = (count * _cosines(embeddings, embeddings).mean() - 1.0) / (count - 1) if count > 1 else 1.0
    base = _cosines(pictures[BASE][kind].embeddings, embeddings).mean()
    return Reference(embeddings, float((own + base) / 2.0))


def _cosines(pictures: torch.Tensor, reference: torch.Tensor) -> Values:
    """Return the mean cosine of each picture to the reference's."""
    return 2.0 * np.asarray(cross_similarity(pictures, reference, reduce="mean"), dtype=np.float64) - 1.0


def _appears(pictures: Embedded, reference: Reference) -> Values:
    """Return 1 for each picture in which the concept appears, else 0; [P, S]."""
    cosines = _cosines(pictures.embeddings, reference.embeddings)
    return by_prompt((cosines > reference.threshold).astype(np.float64), pictures)


def _drifts(pictures: Pictures, model: str) -> Values:
    """Return the drift of each general picture; [P, S]."""
    return 1.0 - paired_similarity(pictures[BASE][GENERAL], pictures[model][GENERAL])


def _added(alone: Values, together: Values) -> Interval:
    prompts = np.repeat(np.arange(len(alone)), alone.shape[1])
    return paired_interval(Paired(alone.ravel(), together.ravel(), prompts), "mean")


def _sentences(stack: Stack) -> Iterator[str]:
    for member in stack.members:
        if member.kept is not None and member.appears is not None and member.appears_alone is not None:
            yield (
                f"In {stack.name}, {member.name!r} keeps {member.kept.value:.0%} of its own effect "
                f"({format_interval(member.kept)}), and what it is asked for appears in {member.appears.value:.0%} of "
                f"the pictures (alone in {member.appears_alone.value:.0%})."
            )
        if member.intrudes is not None and member.intrudes.low > 0.0:
            yield (
                f"In {stack.name}, what {member.name!r} draws appears in {member.intrudes.value:.0%} of the pictures "
                "that ask for another."
            )
    if stack.added.low > 0.0:
        more = f"{format_interval(stack.added)} more than"
    elif stack.added.high < 0.0:
        more = f"{format_interval(stack.added, '+')} beside"
    else:
        more = "not measurably more than"
    drift = format_interval(stack.drift)
    yield f"{stack.name} changes general prompts by drift {drift}, {more} {stack.worst!r} alone."
