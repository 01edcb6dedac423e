"""make test-gpu: what it runs and writes, with a process in the place of pytest."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import harness
from benchmarks.gpu import meter

ROOT = Path(__file__).resolve().parents[2]
REPORT = """<testsuites><testsuite>
<testcase classname="tests.cuda.test_gpu" name="test_one"/>
<testcase classname="tests.cuda.test_gpu" name="test_two"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.cuda.test_gpu" name="test_three"><skipped message="there is one GPU"/></testcase>
<testcase classname="tests.cuda.test_gpu" name="test_four"/>
</testsuite></testsuites>"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("test_gpu_script_of_make", ROOT / "scripts" / "test_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "sanitizer_status", "expected"),
    [(False, 0, "not installed"), (True, 0, "no errors"), (True, 9, "errors (exit status 9)")],
)
def test_what_passed_is_written(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: bool,
    sanitizer_status: int,
    expected: str,
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        for part in command:
            if part.startswith("--junitxml="):
                Path(part.partition("=")[2]).write_text(REPORT)
        status = sanitizer_status if command[0] == "compute-sanitizer" else 1
        return subprocess.CompletedProcess(command, status)

    class Gpu:
        def describe(self) -> dict[str, str]:
            return {"GPU": "one"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(script.shutil, "which", lambda name: name if installed else None)
    monkeypatch.setattr(meter, "Meter", Gpu)
    monkeypatch.setattr(harness, "describe_machine", lambda: {"torch": "2"})
    assert script.main(["--output", str(tmp_path / "passed.md"), "-x"]) == 1
    text = (tmp_path / "passed.md").read_text()
    assert f"`make test-gpu`: 2 passed, 1 failed, 1 skipped; compute-sanitizer: {expected}." in text
    assert "- failed: `tests.cuda.test_gpu::test_two`: assert 1 == 2\n" in text
    assert "- skipped: `tests.cuda.test_gpu::test_three`: there is one GPU" in text
    assert "| GPU | one |" in text
    assert all("-x" in command and command[command.index("-m", 3) + 1] == "gpu" for command in commands[:1])
    assert len(commands) == 1 + installed
