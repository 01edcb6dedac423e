"""remove_trigger, as tables of captions."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable

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
    ("a.b*c cat", "a.b*c", "cat"),
    ("a [V] cat", "[v]", "a cat"),
    ("$x^2 (cat)", "$x^2", "(cat)"),
    (r"a\d cat", r"a\d", "cat"),
    ("a `sks` cat", "sks", "a cat"),
    ("a “sks” cat", "sks", "a cat"),
    ("the o’neil cat", "o'neil", "the cat"),
    ("sks\u00a0cat", "sks", "cat"),
    ("olis\u3000beach cat", "olis beach", "cat"),
]

UNCHANGED = [
    ("a photo of sksy", "sks"),
    ("a photo of asks", "sks"),
    ("sks_2 and sks2", "sks"),
    ("a photo of sks", "<sks>"),
    ("a photo  of , a cat ,", "sks"),
    ("olis on the beach", "olis beach"),
    ("", "sks"),
    ("sks², sksö, sksж", "sks"),
]

# What text encoders read alike, or people write for one another: case and Unicode's forms. Caption, trigger, expected.
ONE_WORD = [
    ("a photo of \u0130PEK dog", "ipek", "a photo of dog"),
    ("a photo of ipek dog", "\u0130PEK", "a photo of dog"),
    ("a photo of i\u0307pek dog", "\u0130pek", "a photo of dog"),
    ("a photo of \u0131sparta dog", "Isparta", "a photo of dog"),
    ("5 \u00b5m dog", "\u03bcm", "5 dog"),
    ("5 \u03bcm dog", "\u00b5m", "5 dog"),
    ("a \u017fks dog", "sks", "a dog"),
    ("a \u212aim dog", "kim", "a dog"),
    ("Straße dog", "STRASSE", "dog"),
    ("STRASSE dog", "straße", "dog"),
    ("STRAẞE dog", "strasse", "dog"),
    ("ΣΊΣΥΦΟΣ dog", "σίσυφος", "dog"),
    ("zoe\u0301 dog", "zoé", "dog"),
    ("ZOÉ dog", "zoe\u0301", "dog"),
    ("q\u0323\u0307 dog", "q\u0307\u0323", "dog"),
    ("ｓｋｓ dog", "sks", "dog"),
    ("ﬁdo dog", "FIDO", "dog"),
    ("\u2764\ufe0f dog", "\u2764", "dog"),
    ("나비 dog", unicodedata.normalize("NFD", "나비"), "dog"),
    (unicodedata.normalize("NFD", "나비 dog"), "나비", "dog"),
]

# A letter of the caption is never cut: marks, joined signs and parts of a ligature belong to it.
INSIDE_A_LETTER = [
    ("a zoe\u0301 dog", "zoe"),
    ("a zoé dog", "zoe"),
    ("soﬁ", "sof"),
    ("½", "1"),
    ("कमला", "कमल"),
    ("👩\u200d🚀", "👩"),
    ("👩\u200d🚀", "🚀"),
    ("👍🏽", "👍"),
    ("김치", "기"),
    (unicodedata.normalize("NFD", "김치"), "기"),
    (unicodedata.normalize("NFD", "ガム"), "カ"),
    ("ខ្មែរ", "មែរ"),
]

# Caption, trigger, class word, expected.
UNSPACED = [
    ("一只小黑猫坐在沙发上", "小黑猫", "猫", "一只猫坐在沙发上"),
    ("一只小黑猫坐在沙发上", "小黑猫", None, "一只坐在沙发上"),
    ("一只小黑坐在沙发上", "小黑", "cat", "一只cat坐在沙发上"),
    ("一只小黑猫坐在沙发上", "小黑", "猫", "一只猫坐在沙发上"),
    ("一只sks狗在海滩上", "sks", "狗", "一只狗在海滩上"),
    ("一只sks在海滩上", "sks", "狗", "一只狗在海滩上"),
    ("初音ミクが歌っている", "初音ミク", "女の子", "女の子が歌っている"),
    ("あのミクさん", "ミク", "女の子", "あの女の子さん"),
    ("ﾐｸが歌う", "ミク", "女の子", "女の子が歌う"),
    ("初音ミク、青い髪", "初音ミク", None, "青い髪"),
    ("1girl，初音ミク，青い髪", "初音ミク", None, "1girl，青い髪"),
    ("这是「小黑猫」。", "小黑猫", "猫", "这是「猫」。"),
    ("青い髪（初音ミク）。", "初音ミク", None, "青い髪。"),
    ("แมวส้มนอนบนโซฟา", "แมวส้ม", "แมว", "แมวนอนบนโซฟา"),
    ("รูปsksบนโซฟา", "sks", "แมว", "รูปแมวบนโซฟา"),
    ("ឆ្មាពណ៌ទឹកក្រូចដេក", "ឆ្មាពណ៌ទឹកក្រូច", "ឆ្មា", "ឆ្មាដេក"),
    ("ဒီကြောင်လေးအိပ်နေတယ်", "ကြောင်လေး", "ကြောင်", "ဒီကြောင်အိပ်နေတယ်"),
    ("나비가 앉아 있다", "나비", "고양이", "고양이가 앉아 있다"),
    ("고양이 나비가 앉아 있다", "나비", "고양이", "고양이가 앉아 있다"),
    ("sks가 앉아 있다", "sks", "고양이", "고양이가 앉아 있다"),
    ("흰나비가 앉아 있다", "나비", "고양이", None),
]

# Caption, trigger, class word, expected.
ARTICLES = [
    ("a sks animal", "sks", "animal", "an animal"),
    ("a photo of a sks", "sks", "owl", "a photo of an owl"),
    ("a sks orange on a plate", "sks", None, "an orange on a plate"),
    ("an sks dog, an apple", "sks", "dog", "a dog, an apple"),
    ("A sks animal", "sks", "animal", "An animal"),
    ("An sks dog", "sks", "dog", "A dog"),
    ("A SKS ANIMAL", "sks", "animal", "AN ANIMAL"),
    ("a <sks> animal", "sks", "animal", "an animal"),
    ('a "sks" animal', "sks", "animal", "an animal"),
    ("a (sks) animal", "sks", "animal", "an animal"),
    ("a sks zwx animal", ["sks", "zwx"], "animal", "an animal"),
    ("a sks", "sks", "unicorn", "a unicorn"),
    ("an sks", "sks", "uniform", "a uniform"),
    ("a sks", "sks", "umbrella", "an umbrella"),
    ("a sks", "sks", "hourglass", "an hourglass"),
    ("an sks", "sks", "European bison", "a European bison"),
    ("a sks", "sks", "one-eyed cat", "a one-eyed cat"),
    ("an sks UFO", "sks", None, "an UFO"),
    ("a photo of a sks on a beach", "sks", None, "a photo of a on a beach"),
    ("a sks, orange", "sks", None, "a, orange"),
    ("a red sks animal", "sks", "animal", "a red animal"),
    ("ein sks Apfel", "sks", None, "ein Apfel"),
]

# The class word is not what the captions call the concept: what comes out, and whether that is said.
ANOTHER_NOUN = [
    ("a sks fruit", "dog", "a dog fruit"),
    ("a sks fruit on a red background", "dog", "a dog fruit on a red background"),
    ("a photo of sks fruit, outdoors", "dog", "a photo of dog fruit, outdoors"),
    ("a sks red fruit lying on a table", "dog", "a dog red fruit lying on a table"),
    ("my sks puppy", "dog", "my dog puppy"),
    ("sks with a red dog; the sks red dog", "dog", "dog with a red dog; the dog red dog"),
]
AFTER_THE_TRIGGER = [
    "a sks on a red background",
    "a sks sleeping on a bed",
    "the sks wears a hat",
    "sks sat here",
    "sks and a cat",
    "sks's bowl",
    "sks, a red bowl",
    "a sks dog house",
    "a sks dogs' house",
    "a sks.",
    "a sks (red)",
    "a sks",
]

LONG = [
    *("sks " * 22_000, "a photo of a sks cat, " * 4_000, "sks, " * 17_000 + "a cat", "a sks-" * 15_000),
    *("a photo of a cat " + "word " * 10_000 + "sks " * 9_000, "<" * 88_000 + "sks", "< " * 44_000 + "sks"),
    *("'" * 88_000 + "sks", "-" * 88_000 + " sks x", "(" * 40_000 + "sks" + ")" * 40_000, " " * 88_000 + "sks"),
    *(
        "sks" + " \n" * 44_000 + "cat",
        "小黑猫" * 29_000,
        "sks " + "a" + "\u0301\u0323" * 44_000,
        "a (" * 29_000 + "sks",
    ),
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
    ("a cat (sks) outdoors", "sks", "cat", "a cat outdoors"),
    ("a cat (sks, red) outdoors", "sks", "cat", "a cat (red) outdoors"),
    ("a [sks] cat outdoors", "sks", "cat", "a cat outdoors"),
    ("a sks-cat", "sks", "cat", "a cat"),
    ("sks\u200bcat", "sks", "cat", "cat"),
    ("sks-zwx-toy", {"sks": "cat", "zwx": None}, None, "cat toy"),
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


@pytest.mark.parametrize(("caption", "trigger", "expected"), ONE_WORD)
def test_spellings_of_one_word_are_equal(caption: str, trigger: str, expected: str) -> None:
    assert remove_trigger(caption, trigger) == (expected, True)
    assert remove_trigger(caption, {trigger: "dog"}) == (expected, True)
    assert remove_trigger(caption.removesuffix("dog"), trigger, "dog") == (expected, True)


def normalized(form: str) -> Callable[[str], str]:
    return lambda text: unicodedata.normalize(form, text)  # type: ignore[arg-type]


def test_every_letter_is_found_in_every_form() -> None:
    forms = [str.lower, str.upper, str.title, str.casefold, *map(normalized, ("NFC", "NFD", "NFKC", "NFKD"))]
    letters = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("L")]
    pairs = {(letter, form(letter)) for letter in letters for form in forms} - {(letter, letter) for letter in letters}
    assert len(pairs) > 10_000
    for letter, other in sorted(pairs)[::7]:
        expected = ("a dog", True)
        assert remove_trigger(f"a x{letter}y dog", f"X{other}y") == expected, ascii((letter, other))
        assert remove_trigger(f"a x{other}y dog", f"X{letter}y") == expected, ascii((letter, other))


@pytest.mark.parametrize(("caption", "trigger"), INSIDE_A_LETTER)
def test_a_letter_is_not_cut(caption: str, trigger: str) -> None:
    assert remove_trigger(caption, trigger, "cat") == (caption, False)


@pytest.mark.parametrize(("caption", "trigger", "class_word", "expected"), UNSPACED)
def test_scripts_without_spaces(caption: str, trigger: str, class_word: str | None, expected: str | None) -> None:
    assert remove_trigger(caption, trigger, class_word) == (expected or caption, expected is not None)


@pytest.mark.parametrize(("caption", "trigger", "class_word", "expected"), ARTICLES)
def test_articles_fit_the_word_that_follows(
    caption: str, trigger: TriggerWords, class_word: str | None, expected: str
) -> None:
    assert remove_trigger(caption, trigger, class_word) == (expected, True)


@pytest.mark.parametrize(("caption", "class_word", "expected"), ANOTHER_NOUN)
def test_a_class_word_beside_another_noun_is_said(caption: str, class_word: str, expected: str) -> None:
    with pytest.warns(
        UserWarning, match=r"class_word: 'dog' takes the trigger's place in 'dog .*'; expected the word"
    ):
        assert remove_trigger(caption, "sks", class_word) == (expected, True)


@pytest.mark.parametrize("caption", AFTER_THE_TRIGGER)
def test_other_words_after_the_trigger_are_fine(caption: str) -> None:
    assert remove_trigger(caption, "sks", "dog")[1]


@pytest.mark.parametrize("class_word", [None, "cat"])
@pytest.mark.parametrize("caption", LONG, ids=lambda caption: ascii(caption[:12]))
def test_time_is_linear(caption: str, class_word: str | None) -> None:
    start = time.process_time()
    assert remove_trigger(caption, ["sks", "小黑猫"], class_word)[1]
    assert time.process_time() - start < 10


@pytest.mark.parametrize("trigger", ["", "  ", [], ["sks", ""], {}, [3], "\ufe0f", 3, None, [["sks"]]])
def test_unusable_triggers_are_refused(trigger: TriggerWords) -> None:
    with pytest.raises(PromptError, match="trigger_words: expected"):
        remove_trigger("a photo", trigger)


def test_unusable_captions_and_class_words_are_refused() -> None:
    with pytest.raises(PromptError, match="caption: expected a text, got NoneType"):
        remove_trigger(None, "sks")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="class_word: expected a text or None, got int"):
        remove_trigger("sks", "sks", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("caption", "class_word", "expected"),
    [
        ("uma foto de sks bonita", "gata", "uma foto de gata bonita"),
        ("a sks irmã", "irmã", "a irmã"),
        ("a sks adormecida na praia", "irmã", "a irmã adormecida na praia"),
        ("a sks está dormindo", "gata", "a gata está dormindo"),
        ("un sks dormido", "gato", "un gato dormido"),
        ("la foto, sks negro", "gato", "la foto, gato negro"),
        ("sks noir dans un jardin", "chien", "chien noir dans un jardin"),
        ("a photo of a sks in a café", "animal", "a photo of an animal in a café"),
        ("the red sks on a table", "dog", "the red dog on a table"),
        ("my sleepy sks", "dog", "my sleepy dog"),
        ("the dog sks", "dog", "the dog"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_no_warning_and_no_english_article_in_other_languages(caption: str, class_word: str, expected: str) -> None:
    assert remove_trigger(caption, "sks", class_word) == (expected, True)


@pytest.mark.parametrize("caption", ["the fruit sks", "my fruit sks on a table", "a photo of the fruit sks, outdoors"])
def test_another_noun_before_the_trigger_is_warned_of(caption: str) -> None:
    with pytest.warns(UserWarning, match="'dog' takes the trigger's place in 'fruit dog'"):
        remove_trigger(caption, "sks", "dog")
