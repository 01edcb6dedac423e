"""The log of a resumed run keeps every line up to its checkpoint, or says which one is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from cat_rs.run_folder import metrics_rows
from cat_rs.training import CheckpointError
from cat_rs.training.log import MetricsLog


def write_log(folder: Path, *lines: str) -> Path:
    file = folder / "metrics.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_lines_after_the_checkpoint_and_a_cut_one_are_dropped(tmp_path: Path) -> None:
    file = write_log(tmp_path, '{"step": 1}', '{"step": 2}', '{"step": 3}', '{"step": 4, "lo')
    log = MetricsLog(tmp_path, after_step=2, tensorboard=False)
    log.write(3, {"loss": 0.5})
    log.close()
    assert metrics_rows(file) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_a_broken_line_stops_the_run_and_loses_nothing(tmp_path: Path) -> None:
    file = write_log(tmp_path, '{"step": 1}', "nonsense", '{"step": 3}')
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"line 2 of .*metrics\.jsonl is not valid JSON.*mend or remove"):
        MetricsLog(tmp_path, after_step=3, tensorboard=False)
    assert file.read_bytes() == before
