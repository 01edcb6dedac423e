"""The benchmark scripts run, check their contenders, and write what they say; at sizes that prove nothing."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from benchmarks import harness
from benchmarks.__main__ import SCRIPTS
from benchmarks.harness import Case, Contender

FOLDER = Path(harness.__file__).parent
HELPERS = {"__init__", "__main__", "harness", "models"}


def _report(name: str = "op", *, smoke: bool = False) -> harness.Report:
    return harness.Report(name, "Title", 3, f"python -m benchmarks.{name}", smoke)


def test_every_script_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - HELPERS == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_and_writes_its_results(name: str, tmp_path: Path) -> None:
    script = importlib.import_module(f"benchmarks.{name}")
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json", f"{name}.md"]
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["smoke"] is True
    assert content["command"] == f"python -m benchmarks.{name} --smoke"
    assert harness.OURS in {row["provider"] for row in content["rows"]}
    for row in content["rows"]:
        assert row.keys() == {field.name for field in fields(harness.Row)}
        assert row["p20"] <= row["p50"] <= row["p80"]
    assert content["ratios"]
    assert all(ratio["met"] is None and math.isfinite(ratio["value"]) for ratio in content["ratios"])
    assert "A smoke run" in (tmp_path / f"{name}.md").read_text()


def test_contenders_take_turns_and_prepare_before_each_call() -> None:
    calls: list[str] = []
    contenders = [
        Contender("a", lambda: calls.append("a"), prepare=lambda: calls.append("prepare a")),
        Contender("b", lambda: calls.append("b"), prepare=lambda: calls.append("prepare b")),
    ]
    samples = harness.measure(contenders, repeats=3, warm_up=2)
    assert calls == ["prepare a", "a", "prepare b", "b"] * 5
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}


def test_fast_operations_are_repeated_within_a_sample() -> None:
    calls: list[int] = []
    harness.measure([Contender("a", lambda: calls.append(1))], repeats=2, sample_seconds=1e-3)
    assert len(calls) > 20


@pytest.mark.parametrize(("bar", "expected"), [(">= 2", True), (">= 2.5", False), ("<= 2", True), ("<= 0.6", False)])
def test_bars_hold_at_the_limit(bar: str, expected: bool) -> None:
    assert harness.meets(2.0, bar) is expected


def test_a_missed_bar_is_said(tmp_path: Path) -> None:
    report = _report()
    report.add_times(Case("forward", "float32", "(1,)"), {"torch": [3e-3, 4e-3, 5e-3], "cat_rs": [2e-3, 2e-3, 2e-3]})
    assert report.add_ratio("torch / cat_rs", [3.0, 4.0, 5.0], [2.0, 2.0, 2.0], ">= 3") == 2.0
    report.write(tmp_path)
    assert [ratio.what for ratio in report.missed()] == ["torch / cat_rs"]
    table = (tmp_path / "op.md").read_text()
    assert "| torch / cat_rs | 2.00 (1.70 to 2.30) | >= 3 | **no** |" in table
    assert "| torch | forward | float32 | (1,) | time | 4.00 ms (3.40 to 4.60) |" in table


def test_a_smoke_run_claims_no_bar() -> None:
    report = _report(smoke=True)
    report.add_ratio("torch / cat_rs", [3.0], [1.0], ">= 2")
    assert report.ratios[0].met is None


@pytest.mark.parametrize("wrong", [1.001, math.nan])
def test_a_wrong_result_is_not_timed(wrong: float) -> None:
    reference = torch.ones(4, dtype=torch.float64)
    harness.check_close("op", torch.ones(4), reference, 1e-5)
    with pytest.raises(harness.BenchmarkError, match=r"op: differs .* in 1 of 4 elements; worst at 2: expected 1,"):
        harness.check_close("op", torch.tensor([1, 1, wrong, 1]), reference, 1e-5)
    with pytest.raises(harness.BenchmarkError, match=r"expected shape \[4\], got \[3\]"):
        harness.check_close("op", torch.ones(3), reference, 1e-5)


def test_results_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = _report()
    report.write(tmp_path)
    before = (tmp_path / "op.json").read_bytes()
    report.note("new")

    def no_rename(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(harness.os, "replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path)
    assert (tmp_path / "op.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["op.json", "op.md"]
