"""The experiments' code: every method trains, and figures are computed as the tables say."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cat_rs.evaluation import EvaluationResult

pytest.importorskip("diffusers")
ROOT = Path(__file__).parent.parent
STUDY = ROOT / "examples" / "study"


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """The study's modules, which import each other by their own names."""
    sys.path.insert(0, str(STUDY))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        own = ("analysis", "concepts", "methods", "multi", "study")
        modules = (*own, "by_prompts", "demo_setting", "stopped_early", "teacher_bank")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in modules})
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(STUDY))


def names() -> list[str]:
    methods = ("LoRA", "prior preservation", "separate samples", "blank prompt", "CAT 0.5", "CAT ratio", "CAT bank")
    return [*methods, "CAT prompts"]


@pytest.mark.parametrize("name", names())
def test_every_method_trains(study: Any, name: str, tmp_path: Path) -> None:
    concept = study.concepts.read_concepts()["tractor"]
    data = tmp_path / "data"
    concept.write_data(data)
    method = replace(study.methods.METHODS[name], steps=2, kept=(1, 2))
    method.train(method, concept, 0, data, tmp_path / "run")
    first, second = (load_file(study.methods.adapter_file(tmp_path / "run", step)) for step in (1, 2))
    assert first.keys() == second.keys()
    # B begins at zero.
    assert all(weight.any() for key, weight in second.items() if "lora_B" in key)
    assert any(not torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["LoRA", "CAT 1", "CAT prompts"])
def test_one_adapter_learns_three_concepts(study: Any, name: str, tmp_path: Path) -> None:
    for concept in study.multi.trio():
        concept.write_data(tmp_path / "data")
    method = replace(study.multi.together(study.methods.METHODS[name]), steps=2, kept=(2,))
    method.train(method, study.multi.trio()[0], 0, tmp_path / "data", tmp_path / "run")
    assert study.methods.adapter_file(tmp_path / "run", 2).exists()


def test_all_methods_of_the_study_are_covered(study: Any) -> None:
    factors = {"CAT 1", "CAT 2", "CAT 6"}
    assert set(names()) | factors == set(study.methods.METHODS)


def test_captions_carry_the_concepts_own_trigger(study: Any) -> None:
    for concept in study.concepts.read_concepts().values():
        assert all(f" {concept.trigger} {concept.class_word} " in caption for caption in concept.captions)
        assert not any(concept.trigger in caption.split() for caption in concept.captions_no_trigger)
        concept.prompts()


def test_added_adapters_are_their_sum(study: Any, tmp_path: Path) -> None:
    states = []
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        states.append(
            {
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.randn(
                    2, 8, generator=generator
                ),
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.randn(
                    6, 2, generator=generator
                ),
            }
        )
    files = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    study.multi.added(files, tmp_path / "sum.safetensors")
    total = load_file(tmp_path / "sum.safetensors")

    def product(state: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = {("B" if "lora_B" in key else "A"): value for key, value in state.items()}
        return parts["B"] @ parts["A"]

    torch.testing.assert_close(product(total), sum(map(product, states)))


def test_the_rate_of_wrong_concepts(study: Any) -> None:
    prompts = {concept.name: concept.trigger_prompts[0] for concept in study.multi.trio()}

    def row(prompt: str, *seen: str) -> dict[str, Any]:
        return {"model": "a", "prompt": prompt, "cosines": {name: 0.9 * (name in seen) for name in study.multi.TRIO}}

    rows = [
        row(prompts["pineapple"], "pineapple"),
        row(prompts["tractor"], "tractor", "panda"),
        row(prompts["panda"]),
        row("a fruit", "pineapple"),
        row("a dog"),
    ]
    appearances = {"thresholds": dict.fromkeys(study.multi.TRIO, 0.5), "pictures": rows}
    rates = study.multi.wrong_rates(appearances)["a"]
    assert rates["wrong"] == pytest.approx(2 / 5)
    assert rates["wrong with trigger"] == pytest.approx(1 / 3)
    assert rates["wrong without trigger"] == pytest.approx(1 / 2)
    assert rates["right"] == pytest.approx(2 / 3)


def test_equal_identity_takes_the_nearest_adapter_of_plain_lora(study: Any) -> None:
    point = study.analysis.Point
    plain = {
        f"LoRA @ {step}": point({"identity": 0.4 + step / 1000, "ups": 1.0 - step / 1000}, {})
        for step in study.methods.METHODS["LoRA"].kept
    }
    cat = {"CAT 1 @ 400": point({"identity": 0.61, "ups": 0.9}, {})}
    far = {"CAT 1 @ 400": point({"identity": 0.95, "ups": 0.9}, {})}
    found = study.analysis.compare({("tractor", 0): plain | cat, ("tractor", 1): plain | far}, "CAT 1")
    assert found["runs"] == 1
    assert found["plain_stopped_at"] == [200]
    assert found["ups"].value == pytest.approx(0.9 - 0.8)


@pytest.mark.parametrize("settings", [{"cat_factor": 0.0}, {"teacher_draws": 1}], ids=["plain", "bank"])
def test_an_adapter_trains_as_in_the_demo(study: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    result = study.demo_setting.train_adapter("tractor", 0, tmp_path, steps=2, **settings)
    assert result.steps == 2
    assert all(weight.any() for key, weight in load_file(result.adapter).items() if "lora_B" in key)


def test_plain_lora_stops_where_it_has_cats_identity(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, concept, seed, demo = study.stopped_early.demo_runs()[0]
    scored = []

    def score(_work: Path, _concept: str, _seed: int, step: int) -> EvaluationResult:
        """The demo's plain LoRA, with another identity in every checkpoint."""
        scored.append(step)
        plain = demo.adapters["LoRA"]
        scores = replace(plain, identity=replace(plain.identity, value=0.28 + 0.002 * step))
        rows = tuple(replace(row, model="stopped") for row in demo.prompts if row.model == "LoRA")
        return replace(demo, adapters={"stopped": scores}, prompts=rows)

    monkeypatch.setattr(study.stopped_early, "score", score)
    found = study.stopped_early.stop(Path(), concept, seed, demo)
    # 0.38, 0.48, 0.58: the first within 0.02 of CAT's 0.599.
    assert scored == [50, 100, 150]
    assert found["cat_minus_lora"]["stopped"] == found["cat_minus_lora"]["LoRA"]
    page = study.stopped_early.page([{"file": file, "concept": concept, "seed": seed, **found}])
    assert "| pineapple, 0 (demo) | LoRA, 150 | 0.857 [0.816, 0.900] |" in page
    assert "| pineapple, 0 (demo) | CAT, 1200 | 0.969 | 0.599 |" in page
    assert "| pineapple, 0 (demo) | 1200 | +0.111 [+0.077, +0.145] |" in page


def test_the_table_of_the_teacher_bank(study: Any) -> None:
    rows = study.teacher_bank.rows_of([ROOT / "docs/teacher-bank/tractor.json"]).splitlines()
    page = (ROOT / "docs/teacher-bank.md").read_text(encoding="utf-8")
    assert len(rows) == 6
    assert all(row in page for row in rows)
