"""The result of a check, and its JSON.

The JSON file is one object:

    format      "cat-rs check 1"; the number grows when a reader of the old form would go wrong
    settings    {...}: what was drawn, and how; {} where nothing was
    adapters    {name: {"weights", "findings", "pictures"}}: the weights as `WeightReport.to_dict` has them, sentences,
                and the scores of the pictures as the fields of `PictureCheck`; null where nothing was drawn
    stack       the fields of `StackCheck`; null if adapters were not combined

Scores are those of an evaluation's JSON (`cat_rs.evaluation.EvaluationResult`): figures are {"value", "low", "high"},
or null where they do not apply.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cat_rs.adapter_check.weights import WeightReport
from cat_rs.atomic import write_bytes
from cat_rs.evaluation import Interval, PictureGrid, PromptScores, Scores
from cat_rs.evaluation.records import from_json, load_json, to_json

FORMAT = "cat-rs check 1"

KindScores = Mapping[str, Scores]
"""Kind of prompts -> scores; those that `Scores` has for prompts without the trigger are of the kind's prompts."""
KindGrids = Mapping[str, PictureGrid]


@dataclass(frozen=True)
class ScaleCheck:
    """What an adapter does at one scale.

    Attributes:
        scale: What the adapter's update is multiplied by.
        kinds: Scores by kind of prompts; "without the trigger" has those of the general prompts, the class and its
            neighbours together.
        damage: Drift of that kind without the trigger which drifts most, by the upper end of its interval.
        damaged: That kind.
        effect: Drift with the trigger, which is wanted; None without a trigger.
        on_front: Whether no other scale has more effect and less damage.
    """

    scale: float
    kinds: KindScores
    damage: Interval
    damaged: str
    effect: Interval | None
    on_front: bool


@dataclass(frozen=True)
class PictureCheck:
    """What an adapter does to the pictures.

    Attributes:
        trigger: The trigger; None if it is not known.
        class_word: The class word; None if it is not known.
        source: Where both come from.
        prompts: The prompts by kind.
        variants: The false trigger in each prompt of the kind "false triggers".
        left_out: What is not checked and why, as sentences.
        base: The base model's own scores by kind.
        other_seed: Scores by kind of the base model against itself with other noise; empty for a single seed.
        scales: The adapter at each scale, in ascending order.
        max_drift: The damage that is still safe.
        safest: The largest scale whose damage, with its interval, is at most that; None if there is none.
        rows: Scores by kind of each model and prompt; models are called "base", or by their scale.
        grids: Pictures by model and kind; None in a result that was read from a file.
    """

    trigger: str | None
    class_word: str | None
    source: str
    prompts: Mapping[str, tuple[str, ...]]
    variants: tuple[str, ...]
    left_out: tuple[str, ...]
    base: KindScores
    other_seed: KindScores
    scales: tuple[ScaleCheck, ...]
    max_drift: float
    safest: float | None
    rows: Mapping[str, tuple[PromptScores, ...]]
    grids: Mapping[str, KindGrids] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class AdapterCheck:
    """What is known of one adapter.

    Attributes:
        weights: Its layers.
        findings: What a person should know, as sentences.
        pictures: What it does to the pictures; None where nothing was drawn.
    """

    weights: WeightReport
    findings: tuple[str, ...]
    pictures: PictureCheck | None


@dataclass(frozen=True)
class StackedAdapter:
    """An adapter beside others; the figures but its scale are None where its trigger is not known.

    Attributes:
        name: Its name.
        scale: What its update is multiplied by.
        kept: The share of its own effect on its trigger's pictures that the stack has: 1 is all of it.
        appears: The share of the pictures asking for it in which its concept appears.
        appears_alone: The same where the adapter is alone.
        intrudes: The share of the pictures asking for others in which its concept appears.
    """

    name: str
    scale: float
    kept: Interval | None
    appears: Interval | None
    appears_alone: Interval | None
    intrudes: Interval | None


@dataclass(frozen=True)
class Stack:
    """Several adapters at once.

    Attributes:
        name: Their names, with " + " between them.
        members: What becomes of each.
        drift: Drift of the general prompts.
        worst: The one of them that has the largest drift alone.
        added: Drift of the stack minus that of `worst`.
    """

    name: str
    members: tuple[StackedAdapter, ...]
    drift: Interval
    worst: str
    added: Interval


@dataclass(frozen=True)
class StackCheck:
    """All pairs of adapters, and all of them together.

    Attributes:
        scales: The scale of each adapter.
        prompts: The prompts by kind: general ones, and those that call each adapter.
        by_concept: The adapters whose concept is told by pictures of it; of the others, by their pictures when alone.
        stacks: The pairs, then the whole.
        findings: What a person should know, as sentences.
        grids: Pictures by model and kind; None in a result that was read from a file.
    """

    scales: Mapping[str, float]
    prompts: Mapping[str, tuple[str, ...]]
    by_concept: tuple[str, ...]
    stacks: tuple[Stack, ...]
    findings: tuple[str, ...]
    grids: Mapping[str, KindGrids] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class CheckResult:
    """What `check` found.

    Attributes:
        settings: What was drawn, and how.
        adapters: Each adapter by its name.
        stack: What they do together; None if that was not asked.
    """

    settings: Mapping[str, Any]
    adapters: Mapping[str, AdapterCheck]
    stack: StackCheck | None = None

    def to_json(self) -> str:
        """Return the result without its pictures as JSON, in the form described at the top of this module."""
        return to_json(FORMAT, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; an existing file is replaced as a whole or not at all."""
        write_bytes(path, self.to_json().encode(errors="backslashreplace"))

    @classmethod
    def from_json(cls, text: str) -> CheckResult:
        """Read what `to_json` wrote; the result has no pictures.

        Raises:
            EvaluationInputError: The text is something else.
        """
        return from_json(FORMAT, cls, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CheckResult:
        """Read a result that `save` wrote; it has no pictures."""
        return load_json(FORMAT, cls, path)
