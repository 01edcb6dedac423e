"""`cat-rs check` as a whole, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cat_rs
from cat_rs.cli import main


@pytest.mark.filterwarnings("default")
def test_check_prints_saves_and_is_reported(
    tiny_pipeline_dir: Path,
    tiny_clip_dir: Path,
    adapter_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = cat_rs.load_lora(adapter_dir)
    files = [
        str(cat_rs.save_lora(tmp_path / f"{name}.safetensors", lora, metadata={"trigger": {word: "cat"}}))
        for name, word in (("a", "sks"), ("b", "zwx"))
    ]
    output = tmp_path / "check"
    options = ["--model", str(tiny_pipeline_dir), "--encoder", str(tiny_clip_dir), "--output-dir", str(output)]
    options += ["--inference-steps", "1", "--limit", "2", "--scales", "1", "--device", "cpu", "--stack"]
    assert main(["check", *files, *options]) == 0
    text = capsys.readouterr().out
    assert "a: diffusers, " in text
    assert "another seed" in text
    assert "- Without its trigger, the adapter changes 'cat' " in text
    assert "- In a + b, 'a' keeps " in text
    content = json.loads((output / "check.json").read_text())
    assert list(content["adapters"]) == ["a", "b"]
    assert content["stack"]["stacks"][0]["name"] == "a + b"
    kinds = sorted(folder.name for folder in (output / "pictures" / "adapters" / "a" / "base").iterdir())
    assert kinds == sorted(content["adapters"]["a"]["pictures"]["prompts"])
    assert main(["report", str(output), "--output", str(tmp_path / "report")]) == 0
    assert "keeps" in (tmp_path / "report" / "report.html").read_text()
