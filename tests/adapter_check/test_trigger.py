"""Triggers and class words from the metadata of several trainers' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cat_rs import LoraFile
from cat_rs.adapter_check.trigger import Trigger, find_trigger

NOWHERE = Path("nowhere.safetensors")


def file(own: dict[str, Any] | None = None, **metadata: str) -> LoraFile:
    return LoraFile(
        {}, {}, {}, own or {}, {name.replace("__", "."): text for name, text in metadata.items()}, "kohya", None
    )


def kohya(folder: str, tags: dict[str, int]) -> dict[str, str]:
    return {
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 10, "img_count": 4}}),
        "ss_tag_frequency": json.dumps({folder: tags}),
    }


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (file({"trigger": {"sks": "cat"}}), ("sks", "cat")),
        (file({"trigger": {"sks": None, "zwx": "dog"}}), ("sks", None)),
        (file({"trigger": ["sks", "zwx"]}), ("sks", None)),
        (file({"trigger": "sks", "class_word": "cat"}), ("sks", "cat")),
        (file({"merged": [{"scale": 0.7, "trigger": {"sks": "cat"}}]}), ("sks", "cat")),
        (file({"merged": ["?", {"scale": 1.0}, {"trigger": "zwx", "class_word": "dog"}]}), ("zwx", "dog")),
        (file(modelspec__trigger_phrase="sks cat"), ("sks", "cat")),
        (file(modelspec__trigger_phrase="in the style of sks"), ("sks", None)),
        (file(instance_prompt="a photo of a sks cat"), ("sks", "cat")),
        (file(instance_prompt="TOK"), ("TOK", None)),
        (file(**kohya("10_sks cat", {"a photo": 4})), ("sks", "cat")),
        (file(**kohya("5_john_smith man", {})), ("john smith", "man")),
        (file(**kohya("img", {"sks": 4, "outdoors": 2})), ("sks", None)),
        (file(**kohya("img", {f"caption {number}": 1 for number in range(4)})), (None, None)),
        (file({"trigger": {}}, **kohya("3_zwx dog", {})), ("zwx", "dog")),
        (file(), (None, None)),
        (file(ss_tag_frequency="not JSON", ss_dataset_dirs="[1]"), (None, None)),
        (file(ss_tag_frequency='{"img": 3, "other": {"a": "b"}}'), (None, None)),
    ],
)
def test_metadata_tell(lora: LoraFile, expected: tuple[str | None, str | None]) -> None:
    assert find_trigger(lora, NOWHERE)[:2] == expected


def test_the_source_is_named() -> None:
    found = find_trigger(file(**kohya("10_sks cat", {})), NOWHERE)
    assert found.source == "from a folder's name in ss_tag_frequency"
    assert "does not tell" in find_trigger(file(), NOWHERE).source


@pytest.mark.parametrize("name", ["", "pytorch_lora_weights.safetensors"])
def test_a_model_card_tells(name: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\ninstance_prompt: a photo of sks dog\ntags:\n- lora\n---\n# A LoRA\n")
    assert find_trigger(file(), tmp_path / name)[:2] == ("sks", "dog")
    # It may be that of anything else in the folder.
    assert find_trigger(file(), tmp_path / "other.safetensors").word is None
    for broken in ("no metadata", "---\n[\n---\n", "---\ninstance_prompt: 3\n---\n", "---\n- a\n---\n"):
        card.write_text(broken)
        assert find_trigger(file(), tmp_path / name).word is None


@pytest.mark.parametrize(
    ("word", "class_word", "expected"),
    [
        ("zwx", "dog", Trigger("zwx", "dog", "the trigger and class word as given")),
        ("zwx", None, Trigger("zwx", None, "the trigger as given")),
        ("sks", None, Trigger("sks", "cat", "the trigger as given, the rest from cat-rs's metadata")),
        (None, "kitten", Trigger("sks", "kitten", "the class word as given, the rest from cat-rs's metadata")),
    ],
)
def test_what_is_given_wins(word: str | None, class_word: str | None, expected: Trigger) -> None:
    assert find_trigger(file({"trigger": {"sks": "cat"}}), NOWHERE, word, class_word) == expected
