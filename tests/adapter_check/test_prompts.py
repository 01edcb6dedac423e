"""The prompts of a check, by kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cat_rs.adapter_check.prompts import (
    CLASS,
    EMPTY,
    FALSE_TRIGGERS,
    GENERAL,
    KINDS,
    NEIGHBOURS,
    OWN,
    TRIGGER,
    CheckPrompts,
    neighbours_of,
    read_own_prompts,
    write_prompts,
)
from cat_rs.adapter_check.trigger import Trigger
from cat_rs.evaluation import EvaluationFileError, EvaluationInputError
from cat_rs.text_files import general_prompts


def written(word: str | None = "sks", class_word: str | None = "cat", **settings: object) -> CheckPrompts:
    def same_tokens(one: str, other: str) -> bool:
        return one.lower() == other.lower()

    return write_prompts(Trigger(word, class_word, ""), same_tokens, **settings)  # type: ignore[arg-type]


def texts(prompts: CheckPrompts, kind: str) -> list[str]:
    return [prompt.text for prompt in prompts.kinds[kind]]


def test_every_kind_is_written() -> None:
    prompts = written()
    assert tuple(prompts.kinds) == KINDS
    assert "a photo of a sks cat" in texts(prompts, TRIGGER)
    assert texts(prompts, GENERAL) == general_prompts()
    assert "a photo of a cat" in texts(prompts, CLASS)
    assert "a photo of a dog" in texts(prompts, NEIGHBOURS)
    assert not any("cat " in f"{text} " for text in texts(prompts, NEIGHBOURS))
    assert set(texts(prompts, EMPTY)) == {""}
    of_class = [prompt.caption for prompt in prompts.kinds[CLASS]]
    assert of_class == list(dict.fromkeys(texts(prompts, CLASS)))
    assert [prompt.caption for prompt in prompts.kinds[TRIGGER]] == of_class[:8]


def test_false_triggers_are_all_but_the_trigger() -> None:
    prompts = written()
    variants = list(dict.fromkeys(prompt.variant for prompt in prompts.kinds[FALSE_TRIGGERS]))
    assert variants == ["skss", "ssk", "sk", "ohwx", "zwx", "shs", "sks dog", "sks horse", "sks rabbit"]
    assert "a photo of a skss cat" in texts(prompts, FALSE_TRIGGERS)
    assert "a photo of an ohwx cat" in texts(prompts, FALSE_TRIGGERS)
    assert "a photo of a sks dog" in texts(prompts, FALSE_TRIGGERS)
    assert {prompt.caption for prompt in prompts.kinds[FALSE_TRIGGERS] if prompt.variant == "sks dog"} == {
        "a photo of a dog",
        "a dog on a white background",
    }
    # CLIP's tokenizers fold case.
    assert prompts.left_out == (
        "The text encoder reads 'SKS' as the trigger itself, so no false trigger is made of it.",
    )


@pytest.mark.parametrize(
    ("word", "half"), [("john smith", "john"), ("one two three four", "one two"), ("abcd", "ab"), ("x", None)]
)
def test_half_of_a_trigger(word: str, half: str | None) -> None:
    variants = {prompt.variant for prompt in written(word).kinds[FALSE_TRIGGERS]}
    assert half is None or half in variants
    assert word not in variants


def test_what_is_not_known_is_left_out() -> None:
    prompts = written(None, None)
    assert tuple(prompts.kinds) == (GENERAL, EMPTY)
    assert len(prompts.left_out) == 2
    assert tuple(written(None, "cat").kinds) == (GENERAL, CLASS, NEIGHBOURS, EMPTY)
    prompts = written("sks", None)
    assert tuple(prompts.kinds) == (TRIGGER, GENERAL, EMPTY, FALSE_TRIGGERS)
    assert {prompt.caption for prompt in prompts.kinds[TRIGGER]} == {""}
    prompts = written("sks", "gizmo")
    assert NEIGHBOURS not in prompts.kinds
    assert "No neighbours of 'gizmo' are known, so they are left out." in prompts.left_out


def test_neighbours_are_members_of_the_kind_or_of_its_own() -> None:
    assert "apple" in neighbours_of("fruit")
    assert "apple" not in neighbours_of("Apple")
    assert "pear" in neighbours_of("Apple")
    assert neighbours_of("gizmo") == ()


def test_own_prompts_replace_or_add() -> None:
    prompts = written(own={CLASS: ["my cat"], "mine": ["a sks cat indoors"]})
    assert texts(prompts, CLASS) == ["my cat"]
    assert [prompt.caption for prompt in prompts.kinds["mine"]] == ["a cat indoors"]
    assert len(prompts.kinds) == len(KINDS) + 1


def test_a_limit_spreads_over_the_list() -> None:
    prompts = written(limit=5)
    assert {len(kind) for kind in prompts.kinds.values()} == {5}
    everything = general_prompts()
    chosen = texts(prompts, GENERAL)
    assert (chosen[0], chosen[-1]) == (everything[0], everything[-1])
    assert len(set(chosen)) == 5


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("# mine\na cat\n\na dog\n")
    assert read_own_prompts(tmp_path / "own.txt") == {OWN: ["a cat", "a dog"]}
    (tmp_path / "own.json").write_text(json.dumps({"class": ["a cat"]}))
    assert read_own_prompts(tmp_path / "own.json") == {"class": ["a cat"]}
    with pytest.raises(EvaluationFileError, match=r"none\.txt cannot be read"):
        read_own_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("content", ["[]", "{", '{"class": []}', '{"class": "a cat"}', '{"class": [1]}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(EvaluationInputError, match=r"own\.json"):
        read_own_prompts(tmp_path / "own.json")
