"""Text files in UTF-8 with and without a byte order mark, in every reader of the package."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cat_rs.commands.demo import read_concepts
from cat_rs.errors import CatRsError
from cat_rs.evaluation import EvaluationPrompts, EvaluationResult
from cat_rs.options import ConfigError, read_config_file
from cat_rs.run_folder import metrics_rows
from cat_rs.text_files import TextFileError, general_prompts, json_lines, read_prompts, read_text
from cat_rs.training.captions import pair_captions
from cat_rs.training.config import TrainConfig
from cat_rs.training.dataset import read_folder
from tests.conftest import draw_picture


def caption_beside(file: Path) -> Any:
    draw_picture(file.with_suffix(".png"), "red")
    return read_folder(file.parent)[0].caption


def caption_in_metadata(file: Path) -> Any:
    draw_picture(file.parent / "0.png", "red")
    return read_folder(file.parent)[0].caption


def prompts(file: Path) -> Any:
    return EvaluationPrompts.load(file, trigger_words=("sks",)).trigger


def preserved(file: Path) -> Any:
    config = TrainConfig(model="model", data="data", trigger=("sks",), preserve_prompts=str(file))
    return pair_captions(["a sks dog"], config).preserved


ROW = '{"file_name": "0.png", "text": "ein süßer sks"}'
# File, its text, who reads it, what comes out.
READERS: list[tuple[str, str, Callable[[Path], Any], Any]] = [
    ("a.txt", "ein süßer sks\n", caption_beside, "ein süßer sks"),
    ("metadata.jsonl", ROW, caption_in_metadata, "ein süßer sks"),
    ("prompts.txt", "ein süßer sks\n", prompts, ("ein süßer sks",)),
    ("prompts.json", '{"trigger_prompts": ["ein süßer sks"]}', prompts, ("ein süßer sks",)),
    ("preserve.txt", "ein süßer Hund\n", preserved, ("ein süßer Hund",)),
    ("config.yaml", "trigger: süß\n", read_config_file, {"trigger": "süß"}),
    ("config.json", '{"trigger": "süß"}', read_config_file, {"trigger": "süß"}),
    ("CONFIG.JSON", '{"trigger": "süß"}', read_config_file, {"trigger": "süß"}),
    ("metrics.jsonl", '{"step": 1, "loss": 2, "süß": 3}\n', metrics_rows, [{"step": 1, "loss": 2, "süß": 3}]),
]
ENCODINGS = ["utf-8", "utf-8-sig"]
OTHERS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("name", "text", "read", "expected"), READERS, ids=[reader[0] for reader in READERS])
def test_a_byte_order_mark_is_not_text(
    tmp_path: Path, name: str, text: str, read: Callable[[Path], Any], expected: Any, encoding: str
) -> None:
    (tmp_path / name).write_text(text, encoding=encoding)
    assert read(tmp_path / name) == expected


@pytest.mark.parametrize("encoding", OTHERS)
@pytest.mark.parametrize(("name", "text", "read", "expected"), READERS, ids=[reader[0] for reader in READERS])
def test_other_encodings_are_refused_by_name(
    tmp_path: Path, name: str, text: str, read: Callable[[Path], Any], expected: Any, encoding: str
) -> None:
    (tmp_path / name).write_text(text, encoding=encoding)
    with pytest.raises(
        (CatRsError, OSError), match=rf"{name}\b.*: expected a text in UTF-8, got .*; save it as UTF-8"
    ):
        read(tmp_path / name)


def test_the_demos_concepts_may_have_a_mark(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(
        (Path(__file__).parent.parent / "examples/emoji_model/prompts.json").read_text(), encoding="utf-8-sig"
    )
    assert read_concepts(tmp_path, ())


def test_an_evaluations_result_may_have_a_mark(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "docs/teacher-bank/tractor.json"
    (tmp_path / "results.json").write_text(source.read_text(), encoding="utf-8-sig")
    assert EvaluationResult.load(tmp_path / "results.json").adapters


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_json_line(tmp_path: Path, inside: str) -> None:
    rows = [{"file_name": f"{index}.png", "text": f"a sks{inside}dog"} for index in range(2)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for index in range(2):
        draw_picture(tmp_path / f"{index}.png", "red")
    for end in ("\n", "\r\n"):
        (tmp_path / "metadata.jsonl").write_bytes((end.join(lines) + end).encode())
        if inside in "\u2028\u2029\x85":  # JSON escapes control characters.
            assert [example.caption for example in read_folder(tmp_path)] == [row["text"] for row in rows]
    (tmp_path / "prompts.txt").write_text(f"a sks{inside}dog\n# a comment\r\na sks\r\ra sks cat")
    assert read_prompts(tmp_path / "prompts.txt") == [f"a sks{inside}dog", "a sks", "a sks cat"]


def test_joined_files_leave_no_marks(tmp_path: Path) -> None:
    file = tmp_path / "joined.txt"
    file.write_bytes("\ufeffone\n\ufefftwo\n\ufeff# three\n".encode())
    assert json_lines(file) == ["one", "two", "# three"]
    assert read_prompts(file) == ["one", "two"]
    assert read_text(file).startswith("one")


def test_comments_are_no_prompts_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# what sks must not touch\na dog\n\n  # more\n  a cat\n")
    assert preserved(file) == ("a dog", "a cat")
    file.write_text("# what sks shows\na sks dog\n\n  # more\n")
    assert prompts(file) == ("a sks dog",)


def test_a_missing_file_is_an_error_of_the_operating_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "absent.txt")
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    with pytest.raises(TextFileError, match="UTF-16 or no text"):
        read_text(tmp_path / "a.txt")


def test_only_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "endless").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for name in ("endless", "pipe"):
        with pytest.raises(TextFileError, match="got a pipe or a device"):
            read_text(tmp_path / name)


@pytest.mark.parametrize(("name", "read"), [reader[::2] for reader in READERS if "json" in reader[0].lower()])
def test_endless_brackets_are_refused_by_name(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    (tmp_path / name).write_text("[" * 100_000 + "\n{}\n")
    with pytest.raises(CatRsError, match=name):
        read(tmp_path / name)


def test_half_a_surrogate_pair_is_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('{"trigger_prompts": ["a sks \\ud83d"]}')
    with pytest.raises(CatRsError, match=r"prompts\.json, got half of a surrogate pair"):
        prompts(tmp_path / "prompts.json")


def test_a_setting_in_two_spellings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("class_word: fruit\nclass-word: dog\n")
    with pytest.raises(ConfigError, match="expected each setting once, got class_word as class-word and in its other"):
        read_config_file(path)


@pytest.mark.parametrize("name", ["half \ud800.txt", "nul \0.txt"])
@pytest.mark.parametrize("read", [read_text, prompts, read_config_file, preserved], ids=lambda read: read.__name__)
def test_a_text_that_names_no_file_is_an_error_of_ours(tmp_path: Path, read: Callable[[Path], Any], name: str) -> None:
    with pytest.raises(CatRsError, match="expected the name of a file, got"):
        read(tmp_path / name)


def test_the_general_prompts_are_many_and_distinct_and_hold_no_trigger() -> None:
    prompts = general_prompts()
    assert len(prompts) >= 200
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts)
    words = {word for prompt in prompts for word in re.findall(r"[\w'-]+", prompt)}
    assert not words & {"sks", "zwx", "ohwx", "olis", "xjy"}
    assert all(re.fullmatch(r"[a-z,' -]+", prompt) for prompt in prompts)
