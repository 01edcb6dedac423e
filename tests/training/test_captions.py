"""Captions with and without the trigger, for a training run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cat_rs.options import ConfigError
from cat_rs.training.captions import fill_template, pair_captions
from cat_rs.training.config import TrainConfig
from cat_rs.training.errors import DatasetError


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"model": "model", "data": "data", "trigger": ("sks",)} | settings)


def test_changed_captions_are_counted() -> None:
    pairs = pair_captions(["a sks cat", "a cat"], config(class_word="cat"))
    assert pairs.without_trigger == ("a cat", "a cat")
    assert pairs.summary() == "trigger removed from 1 of 2 captions ('a sks cat' -> 'a cat')"


def test_the_empty_caption_may_stand_for_all() -> None:
    pairs = pair_captions(["a sks cat", "a cat"], config(class_word="cat", preserve="blank"))
    assert pairs.without_trigger == ("", "")
    assert pairs.with_trigger == ("a sks cat", "a cat")


def test_each_trigger_has_its_class_word() -> None:
    pairs = pair_captions(["sks and zwx"], config(trigger=("sks=cat", "zwx"), class_word="dog"))
    assert pairs.without_trigger == ("cat and dog",)


def test_captions_without_trigger_are_refused_and_listed() -> None:
    with pytest.raises(DatasetError, match=re.escape("expected 'sks' in the captions")) as error:
        pair_captions(["a cat", "a sksy dog"], config())
    assert "'a cat'; 'a sksy dog'" in str(error.value)


def test_plain_lora_needs_no_trigger() -> None:
    assert pair_captions(["a cat"], config(cat_factor=0.0)).changed == 0
    assert pair_captions(["a cat"], config(cat_factor=0.0, trigger=())).without_trigger == ("a cat",)


def test_template_is_filled() -> None:
    filled = fill_template(config(caption="a {trigger} {class_word}, {name}", trigger=("sks=cat",)))
    assert filled == "a sks cat, {name}"


@pytest.mark.parametrize("caption", ["a {colour} cat", "a {trigger", "a {} cat", "a {class_word}"])
def test_template_with_other_fields_is_refused(caption: str) -> None:
    with pytest.raises(ConfigError, match=r"caption: expected a text with the fields {trigger}, {name}"):
        fill_template(config(caption=caption))


def test_prompts_to_preserve_are_read_once_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n\n  a red car \na dog\n")
    pairs = pair_captions(["a sks cat"], config(preserve_prompts=str(file)))
    assert pairs.preserved == ("a dog", "a red car")
    assert pairs.summary().endswith("; 2 prompts to preserve")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "expected prompts, one a line, got none"),
        ("a dog\na Sks dog\n", "expected prompts without a trigger, got 'a Sks dog'"),
        (None, "cannot read"),
    ],
    ids=["empty", "trigger", "missing"],
)
def test_prompts_that_cannot_be_preserved_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DatasetError, match=f"preserve_prompts: {message}"):
        pair_captions(["a sks cat"], config(preserve_prompts=str(file)))


def test_a_class_word_that_the_captions_do_not_use_is_said() -> None:
    with pytest.warns(UserWarning, match="class_word: 'dog' takes the trigger's place in 'dog fruit'"):
        pairs = pair_captions(["a sks fruit", "a sks fruit on grass"], config(class_word="dog"))
    assert pairs.without_trigger == ("a dog fruit", "a dog fruit on grass")
