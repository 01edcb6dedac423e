"""Words about an evaluation that tables, drawings and pages share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cat_rs.evaluation import EvaluationResult


def concept_of(result: EvaluationResult) -> str:
    """Return the first trigger word and the class word, such as "sks fruit"."""
    prompts = result.settings["prompts"]
    return " ".join(filter(None, (prompts["trigger_words"][0], prompts["class_word"])))


def encoder_of(result: EvaluationResult) -> str:
    """Return the encoder's name, without the folder that it was loaded from."""
    return Path(result.settings["encoder"]).name


def extent_of(result: EvaluationResult) -> str:
    """Return how many prompts and seeds were evaluated."""
    prompts, seeds = result.settings["prompts"], result.settings["sampling"]["seeds"]
    trigger = count(len(prompts["trigger"]), "prompt")
    return f"{trigger} with the trigger, {len(prompts['no_trigger'])} without, {count(len(seeds), 'seed')}"


def count(number: int, noun: str) -> str:
    """Return "1 seed" or "2 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """Return the names that differ as "a, b and c", those beyond four as their number."""
    different = list(dict.fromkeys(names))
    if len(different) > 4:
        return f"{', '.join(different[:3])} and {len(different) - 3} more"
    return " and ".join(filter(None, (", ".join(different[:-1]), different[-1])))
