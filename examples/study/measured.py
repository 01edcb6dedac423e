"""What the study measured, run by run: from the evaluations in the work folder, or from a published study.json.

Runs of several work folders, such as those of other seeds, make one study.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cat_rs
from cat_rs.evaluation import EvaluationResult
from concepts import read_concepts
from methods import METHODS, PLAIN, RECIPE
from multi import wrong_rates
from rule import RULES, Chooser, Match, match

Run = tuple[str, int]
"""A concept and a seed."""

Pairs = dict[Run, Match]
"""Ours and plain LoRA's adapter of each run where a rule finds them."""

FORMAT = "cat-rs study 1"
KINDS = ("class", "neighbour", "other class", "unlike captions")
FIGURES = ("identity", "ups", "tps", "kps", "drift", "diversity_retained", "prompt_similarity")
FIRST_RULE = next(iter(RULES))
# Kinds of prompts of which those that share a word with the general list are left out.
UNLISTED = {"without those of any kind": KINDS, "without those of other kinds than the class": KINDS[1:]}
OTHERS = tuple(name for name in METHODS if name != PLAIN)


@dataclass(frozen=True)
class Point:
    """The figures of one adapter, and its UPS by kind of prompt."""

    figures: dict[str, float]
    kinds: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """What tables and figure are made of.

    Attributes:
        points: Run -> adapter -> its figures.
        pairs: Method -> rule -> its pairs with plain LoRA.
        unlisted: Which prompts are left out -> method -> its pairs by the first rule.
        judged: Rule -> pairs of the recipe, scored by the other encoder.
        judge: That encoder's name, and what it says of the base model, which is the same in all seeds: UPS beside
            other noise, and identity.
        rates: Seed -> adapter of three concepts -> how often which concepts appear.
        cost: Method -> seconds and memory.
    """

    points: dict[Run, dict[str, Point]]
    pairs: dict[str, dict[str, Pairs]]
    unlisted: dict[str, dict[str, Pairs]]
    judged: dict[str, Pairs]
    judge: dict[str, Any]
    rates: dict[int, dict[str, dict[str, float]]]
    cost: dict[str, dict[str, float]]

    @classmethod
    def in_work(
        cls,
        results: Mapping[Run, Path],
        judged: Mapping[Run, Path],
        together: Mapping[int, Path],
        costs: Mapping[str, Path],
    ) -> Measured:
        """Read evaluations, and the costs that were measured here."""
        own, other = ({run: EvaluationResult.load(file) for run, file in files.items()} for files in (results, judged))
        floors = [each.other_seed.ups.value for each in other.values() if each.other_seed is not None]
        return cls(
            points={run: read_points(result, run[0]) for run, result in own.items()},
            pairs={name: {title: pairs(own, own, name, rule) for title, rule in RULES.items()} for name in OTHERS},
            unlisted={
                title: {name: pairs(own, own, name, RULES[FIRST_RULE], kinds) for name in OTHERS}
                for title, kinds in UNLISTED.items()
            },
            judged={title: pairs(own, other, RECIPE, rule) for title, rule in RULES.items()},
            judge={
                "encoder": next(iter(other.values())).settings["encoder"],
                "base_with_other_noise": mean(floors),
                "base_identity": mean(each.base.identity.value for each in other.values()),
            },
            rates={
                seed: wrong_rates(json.loads(file.read_text(encoding="utf-8"))["appearances"])
                for seed, file in together.items()
            },
            cost={name: json.loads(file.read_text()) for name, file in costs.items() if file.exists()},
        )

    @classmethod
    def published(cls, path: Path) -> Measured:
        """Read what `analysis.write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        points: dict[Run, dict[str, Point]] = {}
        for row in content["runs"]:
            of_run = points.setdefault((row["concept"], row["seed"]), {})
            of_run[row["adapter"]] = Point(row["figures"], row["ups_by_kind"])
        return cls(
            points=points,
            pairs={
                name: {title: read_pairs(found) for title, found in by_rule.items()}
                for name, by_rule in content["against_the_best_plain"].items()
            },
            unlisted={
                title: {name: read_pairs(found) for name, found in by_name.items()}
                for title, by_name in content["without_prompts_of_the_general_list"].items()
            },
            judged={title: read_pairs(found) for title, found in content["judged_by_another_encoder"].items()},
            judge=content.get("judge", {}),
            rates={int(seed): rates for seed, rates in content["three_concepts"].items()},
            cost=content["cost"],
        )

    def updated(self, newer: Measured) -> Measured:
        """Return both as one; a run, seed or cost of `newer` takes the place of ours."""

        def joined(ours: Mapping[Run, Any], theirs: Mapping[Run, Any]) -> dict[Run, Any]:
            return in_order({run: value for run, value in ours.items() if run not in newer.points} | dict(theirs))

        def joined_each(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
            return {name: joined(ours[name], pairs) for name, pairs in theirs.items()}

        return Measured(
            points=joined(self.points, newer.points),
            pairs={name: joined_each(self.pairs[name], by_rule) for name, by_rule in newer.pairs.items()},
            unlisted={title: joined_each(self.unlisted[title], found) for title, found in newer.unlisted.items()},
            judged=joined_each(self.judged, newer.judged),
            judge=newer.judge,
            rates=dict(sorted({**self.rates, **newer.rates}.items())),
            # Times of one machine are comparable.
            cost=newer.cost if newer.cost.keys() == set(METHODS) else self.cost,
        )


def read_points(result: EvaluationResult, concept: str) -> dict[str, Point]:
    """The figures of every adapter of a run."""
    kinds = read_concepts()[concept].kinds
    points = {}
    for name, scores in result.adapters.items():
        figures = {key: getattr(scores, key).value for key in FIGURES if getattr(scores, key) is not None}
        by_kind = {}
        for kind, prompts in kinds.items():
            values = [
                value
                for row in result.prompts
                if row.model == name and row.prompt in prompts
                for value in row.similarity
            ]
            by_kind[kind] = cat_rs.harmonic_mean(values)
        points[name] = Point(figures, by_kind)
    return points


def pairs(
    results: Mapping[Run, EvaluationResult],
    judged: Mapping[Run, EvaluationResult],
    name: str,
    rule: Chooser,
    unlisted: Iterable[str] = (),
) -> Pairs:
    """A method beside plain LoRA in each run: adapters chosen by `results`, differences on the prompts of `judged`.

    Prompts of the kinds `unlisted` that share a word with the general list are left out.
    """
    concepts = read_concepts()
    found = {}
    for run, result in results.items():
        concept = concepts[run[0]]
        pair = match(result, concept, name, rule, judged[run], concept.listed(*unlisted))
        if pair is not None:
            found[run] = pair
    return found


def read_pairs(found: Mapping[str, Any]) -> Pairs:
    """The pairs of a published record, in which a run is named "pineapple, 0"."""
    read = {}
    for name, pair in found["matches"].items():
        concept, _, seed = name.rpartition(", ")
        read[concept, int(seed)] = Match(**pair)
    return read


def in_order(runs: Mapping[Run, Any]) -> dict[Run, Any]:
    """By concept, in the order of the bundled model, then by seed."""
    numbers = {concept: number for number, concept in enumerate(read_concepts())}
    key: Callable[[Run], tuple[int, int]] = lambda run: (numbers[run[0]], run[1])  # noqa: E731
    return {run: runs[run] for run in sorted(runs, key=key)}


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
