"""remove_trigger, as tables of captions."""

from __future__ import annotations

import pytest

from cat_rs.prompts import PromptError, TriggerWords, remove_trigger

REMOVED = [
    ("a photo of sks cat", "sks", "a photo of cat"),
    ("a photo of a sks", "sks", "a photo of a"),
    ("sks", "sks", ""),
    ("sks, a photo", "sks", "a photo"),
    ("a photo, sks", "sks", "a photo"),
    ("a photo, sks, outdoors", "sks", "a photo, outdoors"),
    ("a photo, sks, sks, outdoors", "sks", "a photo, outdoors"),
    ("a photo of sks.", "sks", "a photo of."),
    ("sks. A cat.", "sks", "A cat."),
    ("a photo, sks.", "sks", "a photo."),
    ("a cat (sks) outdoors", "sks", "a cat outdoors"),
    ("a cat (sks, red) outdoors", "sks", "a cat (red) outdoors"),
    ("a cat (red, sks) outdoors", "sks", "a cat (red) outdoors"),
    ('the "sks" cat', "sks", "the cat"),
    ("the 'sks' cat", "sks", "the cat"),
    ("sks's cat", "sks", "cat"),
    ("sks’s cat", "sks", "cat"),
    ("the sks' cat", "sks", "the cat"),
    ("a  sks   cat", "sks", "a cat"),
    ("a sks-like toy", "sks", "a like toy"),
    ("a half-sks toy", "sks", "a half toy"),
    ("SKS cat, Sks dog", "sks", "cat, dog"),
    ("sks\ncat", "sks", "cat"),
    ("a <sks> cat", "<sks>", "a cat"),
    ("a <sks> cat", "sks", "a cat"),
    ("a< sks >cat", "sks", "a cat"),
    ("a<sks>cat", "<sks>", "a cat"),
    ("a half-sks-toy", "sks", "a half toy"),
    ("a photo of olis beach toy", "olis beach", "a photo of toy"),
    ("a photo of olis  beach toy", "olis beach", "a photo of toy"),
    ("sks dog and sks cat", ["sks", "sks dog"], "and cat"),
    ("sks cat and zwx dog", ["sks", "zwx"], "cat and dog"),
    ("ein Foto von жук", "жук", "ein Foto von"),
    ("c++ cat", "c++", "cat"),
]

UNCHANGED = [
    ("a photo of sksy", "sks"),
    ("a photo of asks", "sks"),
    ("sks_2 and sks2", "sks"),
    ("a photo of sks", "<sks>"),
    ("a photo  of , a cat ,", "sks"),
    ("olis on the beach", "olis beach"),
    ("", "sks"),
]

REPLACED = [
    ("a sks cat", "sks", "cat", "a cat"),
    ("a SKS Cat", "sks", "cat", "a Cat"),
    ("two sks cats", "sks", "cat", "two cats"),
    ("the cat sks sleeps", "sks", "cat", "the cat sleeps"),
    ("a photo of sks", "sks", "cat", "a photo of cat"),
    ("a sks category", "sks", "cat", "a cat category"),
    ("sks's bowl", "sks", "cat", "cat's bowl"),
    ("sks' bowl", "sks", "cat", "cat's bowl"),
    ("sks-like", "sks", "cat", "cat-like"),
    ("a<sks>toy", "sks", "cat", "a cat toy"),
    ("sks, outdoors", "sks", "cat", "cat, outdoors"),
    ("sks, a photo of a cat", "sks", "cat", "a photo of a cat"),
    ("a photo of a cat, sks", "sks", "cat", "a photo of a cat"),
    ("a <sks> on grass", "<sks>", "red panda", "a red panda on grass"),
    ("a sks red panda", "sks", "red panda", "a red panda"),
    ("a sks zwx cat", ["sks", "zwx"], "cat", "a cat"),
    ("a sks zwx", ["sks", "zwx"], "cat", "a cat"),
    ("sks and zwx", {"sks": "cat", "zwx": "dog"}, None, "cat and dog"),
    ("sks and zwx", {"sks": "cat", "zwx": None}, "thing", "cat and thing"),
    ("sks and zwx", {"sks": "cat", "zwx": None}, None, "cat and"),
]


@pytest.mark.parametrize(("caption", "trigger", "expected"), REMOVED)
def test_trigger_is_removed(caption: str, trigger: TriggerWords, expected: str) -> None:
    assert remove_trigger(caption, trigger) == (expected, True)


@pytest.mark.parametrize(("caption", "trigger"), UNCHANGED)
def test_caption_without_trigger_is_unchanged(caption: str, trigger: str) -> None:
    assert remove_trigger(caption, trigger) == (caption, False)
    assert remove_trigger(caption, trigger, "cat") == (caption, False)


@pytest.mark.parametrize(("caption", "trigger", "class_word", "expected"), REPLACED)
def test_class_word_stands_in_for_the_trigger(
    caption: str, trigger: TriggerWords, class_word: str | None, expected: str
) -> None:
    assert remove_trigger(caption, trigger, class_word) == (expected, True)


@pytest.mark.parametrize(("caption", "trigger", "class_word", "expected"), REPLACED)
def test_removing_twice_changes_nothing_more(
    caption: str, trigger: TriggerWords, class_word: str | None, expected: str
) -> None:
    once, _ = remove_trigger(caption, trigger, class_word)
    assert remove_trigger(once, trigger, class_word) == (expected, False)


@pytest.mark.parametrize("trigger", ["", "  ", [], ["sks", ""], {}, [3]])
def test_unusable_triggers_are_refused(trigger: TriggerWords) -> None:
    with pytest.raises(PromptError, match="trigger_words: expected"):
        remove_trigger("a photo", trigger)
