"""Captions with and without the trigger, for a training run."""

from __future__ import annotations

import re
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
