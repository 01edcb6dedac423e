"""The log of a resumed training keeps every line up to its checkpoint, or says which one is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from cat_rs.training import CheckpointError
from cat_rs.training.log import drop_lines_after


def write_log(folder: Path, *lines: str) -> Path:
    file = folder / "metrics.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_lines_after_the_checkpoint_and_a_cut_one_are_dropped(tmp_path: Path) -> None:
    file = write_log(tmp_path, '{"step": 1}', '{"step": 2, "loss": null}', '{"step": 3}', '{"step": 4, "lo')
    drop_lines_after(tmp_path, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2, "loss": null}\n'


def test_a_broken_line_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    file = write_log(tmp_path, '{"step": 1}', "nonsense", '{"step": 3}')
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"line 2 of .*metrics\.jsonl is not valid JSON.*mend or remove"):
        drop_lines_after(tmp_path, 3)
    assert file.read_bytes() == before


def test_a_folder_without_a_log_is_left_alone(tmp_path: Path) -> None:
    drop_lines_after(tmp_path, 3)
    assert not list(tmp_path.iterdir())
