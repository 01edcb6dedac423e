"""Checkpoints are whole or absent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_rs import atomic
from cat_rs.training.checkpoint import CheckpointFolder, load_state
from cat_rs.training.errors import CheckpointError


def no_adapter(folder: Path) -> None:
    """A checkpoint without an adapter file."""


def test_latest_few_stay(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (9, 10, 1_000_000):
        checkpoints.save(step, {"step": step}, no_adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-1000000"]
    assert load_state(checkpoints.latest() or "") == {"step": 1_000_000}


def test_state_is_kept_bit_for_bit(tmp_path: Path) -> None:
    state = {"values": torch.randn(7), "rng": torch.get_rng_state(), "nested": {"list": [1, 2.5, None, "a"]}}
    loaded = load_state(CheckpointFolder(tmp_path).save(1, state, no_adapter))
    assert torch.equal(loaded["values"], state["values"])
    assert torch.equal(loaded["rng"], state["rng"])
    assert loaded["nested"] == state["nested"]


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(1, {"step": 1}, no_adapter)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device; the earlier checkpoint .*step-000001 is whole"
    ):
        checkpoints.save(2, {"step": 2}, no_adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert load_state(tmp_path / "step-000001") == {"step": 1}


def test_a_state_that_expands_is_not_read(tmp_path: Path) -> None:
    file = CheckpointFolder(tmp_path).save(1, {"zeros": torch.zeros(100_000)}, no_adapter) / "state.pt"
    with zipfile.ZipFile(file) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"state\.pt: expected parts that torch.save wrote, got .* expand"):
        load_state(file.parent)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_state(file.parent)


def test_kill_while_writing_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    script = f"""
import os, signal
from cat_rs.training.checkpoint import CheckpointFolder

checkpoints = CheckpointFolder({str(tmp_path)!r})
checkpoints.save(1, {{"step": 1}}, lambda folder: None)
checkpoints.save(2, {{"step": 2}}, lambda folder: os.kill(os.getpid(), signal.SIGKILL))
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    checkpoints = CheckpointFolder(tmp_path)
    assert load_state(checkpoints.latest() or "") == {"step": 1}
    checkpoints.save(2, {"step": 2}, no_adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("content", [b"", b"broken", None], ids=["empty", "broken", "absent"])
def test_broken_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    checkpoint = CheckpointFolder(tmp_path).save(1, {"step": 1}, no_adapter)
    (checkpoint / "state.pt").unlink()
    if content is not None:
        (checkpoint / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*step-000001"):
        load_state(checkpoint)
