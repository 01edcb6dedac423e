"""EvaluationPrompts: files, derived prompts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cat_rs.evaluation import EvaluationFileError, EvaluationInputError, EvaluationPrompts

SEVERAL = {
    "trigger_word": "sks",
    "concepts": [
        {
            "name": "tractor",
            "class_word": "vehicle",
            "trigger_prompts": ["a sks vehicle"],
            "class_prompts": ["a vehicle"],
            "neighbour_prompts": ["a bus", "a taxi"],
        },
        {"name": "panda", "class_word": "animal", "trigger_prompts": ["a sks animal"]},
    ],
}


def test_prompts_without_the_trigger_are_derived() -> None:
    prompts = EvaluationPrompts.from_trigger_prompts(["a sks cat, outdoors", "a photo of sks"], ["sks"], "cat")
    assert prompts.no_trigger == ("a cat, outdoors", "a photo of cat")
    assert prompts.class_captions() == prompts.no_trigger


def test_prompts_are_values() -> None:
    one, other = (EvaluationPrompts.from_trigger_prompts(["a sks cat"], ["sks"], "cat") for _ in range(2))
    assert {one: "cached"}[other] == "cached"


def test_text_file_gives_trigger_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# on colours\na sks cat on red\n\n  a sks cat on blue\n")
    prompts = EvaluationPrompts.load(file, trigger_words=["sks"], class_word="cat")
    assert prompts.trigger == ("a sks cat on red", "a sks cat on blue")
    assert prompts.no_trigger == ("a cat on red", "a cat on blue")


def test_json_file_of_one_concept(tmp_path: Path) -> None:
    file = _write(
        tmp_path, {"trigger_words": ["sks"], "trigger_prompts": ["a sks cat"], "other_prompts": ["a dog", "a cat"]}
    )
    prompts = EvaluationPrompts.load(file)
    assert (prompts.trigger, prompts.no_trigger, prompts.class_word) == (("a sks cat",), ("a dog", "a cat"), None)


def test_json_file_of_several_concepts(tmp_path: Path) -> None:
    file = _write(tmp_path, SEVERAL)
    tractor = EvaluationPrompts.load(file, concept="tractor")
    assert tractor.trigger_words == ("sks",)
    assert tractor.class_word == "vehicle"
    assert tractor.no_trigger == ("a vehicle", "a bus", "a taxi")
    assert EvaluationPrompts.load(file, concept="tractor", groups=["neighbour"]).no_trigger == ("a bus", "a taxi")
    assert EvaluationPrompts.load(file, concept="panda").no_trigger == ("an animal",)


def test_arguments_win_over_the_file(tmp_path: Path) -> None:
    file = _write(tmp_path, {"trigger_word": "sks", "class_word": "cat", "trigger_prompts": ["a tok"]})
    prompts = EvaluationPrompts.load(file, trigger_words=["tok"], class_word="dog")
    assert prompts.no_trigger == ("a dog",)


@pytest.mark.parametrize(
    ("content", "arguments", "text"),
    [
        pytest.param(SEVERAL, {}, "expected one of the concepts panda, tractor", id="no concept named"),
        pytest.param(SEVERAL, {"concept": "cat"}, "got cat", id="unknown concept"),
        pytest.param(SEVERAL, {"concept": "panda", "groups": ["class"]}, "got class_prompts", id="unknown group"),
        pytest.param({"concepts": [{}]}, {}, "expected concepts with a name", id="concept without a name"),
        pytest.param({"trigger_prompts": ["a sks cat"]}, {}, "expected trigger words", id="no trigger word"),
        pytest.param({"trigger_word": "sks"}, {}, "trigger: expected at least one", id="no prompt"),
        pytest.param({"trigger_word": "sks", "trigger_prompts": "a sks"}, {}, "list of texts", id="not a list"),
        pytest.param({"trigger_word": "sks", "trigger_prompts": ["a cat"]}, {}, "got 'a cat'", id="trigger missing"),
        pytest.param(
            {"trigger_word": "sks", "trigger_prompts": ["a sks"], "class_prompts": ["a Sks dog"]},
            {},
            "no_trigger: expected prompts without",
            id="trigger where none may be",
        ),
        pytest.param([1], {}, "expected a JSON object", id="not an object"),
    ],
)
def test_unusable_json_is_refused(tmp_path: Path, content: object, arguments: dict[str, object], text: str) -> None:
    with pytest.raises(EvaluationInputError, match=text):
        EvaluationPrompts.load(_write(tmp_path, content), **arguments)  # type: ignore[arg-type]


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(EvaluationInputError, match=r"broken\.json is not valid JSON"):
        EvaluationPrompts.load(broken)
    with pytest.raises(EvaluationFileError, match=r"absent\.txt cannot be read"):
        EvaluationPrompts.load(tmp_path / "absent.txt")


def test_one_text_is_not_a_list_of_prompts() -> None:
    with pytest.raises(EvaluationInputError, match="trigger: expected a list of texts"):
        EvaluationPrompts("a sks cat", ("a cat",), ("sks",))  # type: ignore[arg-type]


def _write(folder: Path, content: object) -> Path:
    file = folder / "prompts.json"
    file.write_text(json.dumps(content))
    return file
