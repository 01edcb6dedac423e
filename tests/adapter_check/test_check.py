"""A whole check on a tiny pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs.adapter_check import CheckResult, PictureCheck
from cat_rs.adapter_check.pictures import WITHOUT
from cat_rs.adapter_check.prompts import CLASS, EMPTY, FALSE_TRIGGERS, GENERAL, KINDS, NEIGHBOURS, TRIGGER
from cat_rs.errors import InvalidValueError
from cat_rs.evaluation import EvaluationConfig, EvaluationInputError
from tests.evaluation.conftest import CountingPipeline

from .conftest import pixels

Check = Callable[..., CheckResult]
CONFIG = EvaluationConfig(num_inference_steps=1, guidance_scale=1.0, seeds=(0, 1), batch_size=16)
LIMIT = 3


@pytest.fixture
def named(adapter_dir: Path, tmp_path: Path) -> Path:
    """The adapter, with a trigger and a class word in its metadata."""
    lora = cat_rs.load_lora(adapter_dir)
    return cat_rs.save_lora(tmp_path / "named.safetensors", lora, metadata={"trigger": {"sks": "cat"}})


@pytest.fixture
def checked(counting: CountingPipeline, tiny_clip_dir: Path, named: Path) -> Check:
    """Return a function that checks the adapter, with any setting replaced."""

    def run(adapters: dict[str, Path] | None = None, encoder: Any = tiny_clip_dir, **settings: Any) -> CheckResult:
        return cat_rs.check(
            adapters or {"mine": named},
            counting,
            encoder,
            **{"limit": LIMIT, "scales": (0.5, 1.0), "config": CONFIG, "progress": False, **settings},
        )

    return run


def pictures(result: CheckResult) -> PictureCheck:
    (adapter,) = result.adapters.values()
    assert adapter.pictures is not None
    return adapter.pictures


def test_every_kind_is_scored_at_every_scale(checked: Check, counting: CountingPipeline) -> None:
    result = checked()
    found = pictures(result)
    assert (found.trigger, found.class_word) == ("sks", "cat")
    assert set(found.prompts) == set(KINDS)
    assert [each.scale for each in found.scales] == [0.5, 1.0]
    assert sum(count for _, count in counting.pictures) == 3 * len(KINDS) * LIMIT * len(CONFIG.seeds)
    for each in found.scales:
        assert set(each.kinds) == {*KINDS, WITHOUT}
        for kind, scores in each.kinds.items():
            for figure in (scores.ups, scores.drift, scores.diversity_retained):
                assert figure is not None, kind
                assert figure.low <= figure.value <= figure.high
            # Nobody asks for anything with an empty prompt.
            assert (scores.prompt_similarity_no_trigger is None) == (kind in (EMPTY, WITHOUT))
        drifts = {kind: each.kinds[kind].drift for kind in (GENERAL, CLASS, NEIGHBOURS)}
        assert each.damage == max(drifts.values(), key=lambda drift: drift.high if drift else 0.0)
        assert drifts[each.damaged] == each.damage
        assert each.effect == each.kinds[TRIGGER].drift
    assert any(each.on_front for each in found.scales)
    assert set(found.other_seed) == {*KINDS, WITHOUT}
    assert len(found.variants) == LIMIT
    assert {row.model for row in found.rows[FALSE_TRIGGERS]} == {"base", "0.5", "1"}
    assert result.adapters["mine"].findings


def test_the_result_is_json(checked: Check, tmp_path: Path) -> None:
    result = checked()
    result.save(tmp_path / "check.json")
    content = json.loads((tmp_path / "check.json").read_text())
    assert content["format"] == "cat-rs check 1"
    assert content["settings"]["sampling"]["seeds"] == [0, 1]
    own = content["adapters"]["mine"]
    assert own["weights"] == json.loads(json.dumps(result.adapters["mine"].weights.to_dict()))
    assert own["findings"] == list(result.adapters["mine"].findings)
    assert own["pictures"]["scales"][1]["kinds"][CLASS]["drift"].keys() == {"value", "low", "high"}
    assert "grids" not in own["pictures"]


def test_an_adapter_that_does_nothing_changes_nothing(checked: Check, named: Path, tmp_path: Path) -> None:
    nothing = cat_rs.merge_loras([named], [0.0]).lora
    path = cat_rs.save_lora(tmp_path / "nothing.safetensors", nothing, metadata={"trigger": {"sks": "cat"}})
    result = checked({"nothing": path})
    found = pictures(result)
    assert found.safest == 1.0
    assert all(each.damage.value == pytest.approx(0.0, abs=1e-6) for each in found.scales)
    text = " ".join(result.adapters["nothing"].findings)
    assert "Without its trigger, the adapter changes 'cat' hardly at all" in text
    assert "Is 'sks' its trigger?" in text


def test_the_largest_safe_scale(checked: Check) -> None:
    def found(**settings: Any) -> PictureCheck:
        return pictures(checked(encoder=pixels, scales=(0.1, 1.0), **settings))

    little, whole = (each.damage.high for each in found().scales)
    assert little < whole
    for bound, expected in ((little * 0.99, None), ((little + whole) / 2, 0.1), (whole * 1.01, 1.0)):
        assert found(max_drift=bound).safest == expected


def test_a_scale_is_that_of_a_merged_file(checked: Check, named: Path, tmp_path: Path) -> None:
    lora = cat_rs.merge_loras([named], [0.5]).lora
    file = cat_rs.save_lora(tmp_path / "half.safetensors", lora, metadata={"trigger": {"sks": "cat"}})
    half = pictures(checked(encoder=pixels)).scales[0]
    folded = pictures(checked({"half": file}, encoder=pixels, scales=(1.0,))).scales[0]
    for kind in KINDS:
        one, other = half.kinds[kind].drift, folded.kinds[kind].drift
        assert one is not None
        assert other is not None
        assert one.value == pytest.approx(other.value, rel=0.1), kind


def test_unknown_triggers_leave_kinds_out(checked: Check, adapter_dir: Path) -> None:
    result = checked({"plain": adapter_dir})
    found = pictures(result)
    assert set(found.prompts) == {GENERAL, EMPTY}
    assert {each.effect for each in found.scales} == {None}
    assert not any(each.on_front for each in found.scales)
    assert set(found.left_out) < set(result.adapters["plain"].findings)
    found = pictures(checked({"plain": adapter_dir}, triggers=["zwx"], class_words=["dog"]))
    assert set(found.prompts) == set(KINDS)
    assert found.source == "the trigger and class word as given"


def test_a_cache_draws_nothing_twice(checked: Check, counting: CountingPipeline, tmp_path: Path) -> None:
    first = checked(cache=tmp_path / "cache")
    counting.pictures.clear()
    assert checked(cache=tmp_path / "cache").to_json() == first.to_json()
    checked(cache=tmp_path / "cache", scales=(0.5, 0.75))
    assert {names for names, _ in counting.pictures} == {("unet",)}
    assert sum(count for _, count in counting.pictures) == len(KINDS) * LIMIT * len(CONFIG.seeds)


def test_several_adapters_share_the_base_pictures(
    checked: Check, counting: CountingPipeline, named: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    result = checked({"mine": named, "plain": adapter_dir}, scales=(1.0,), cache=tmp_path / "cache")
    assert set(result.adapters) == {"mine", "plain"}
    base = sum(count for names, count in counting.pictures if not names)
    assert base == len(KINDS) * LIMIT * len(CONFIG.seeds)


def test_an_adapter_that_does_not_fit_has_its_weights_looked_at(
    checked: Check, named: Path, tmp_path: Path, counting: CountingPipeline
) -> None:
    broken = cat_rs.load_lora(named)
    next(iter(broken.state["unet"].values()))[0, 0] = torch.nan
    path = cat_rs.save_lora(tmp_path / "broken.safetensors", broken)
    own = checked({"broken": path}).adapters["broken"]
    assert own.pictures is None
    assert "not finite" in {finding.kind for finding in own.weights.findings}
    assert own.findings[0].startswith("No pictures are drawn: ")
    assert counting.pictures == []


def test_weights_alone_need_no_model(named: Path) -> None:
    own = cat_rs.check({"mine": named}).adapters["mine"]
    assert (own.pictures, own.findings) == (None, ())
    assert own.weights.layers


def test_seeds_decide_whether_there_is_a_floor(checked: Check) -> None:
    found = pictures(checked(config=replace(CONFIG, seeds=(3,))))
    assert found.other_seed == {}
    assert found.scales[0].kinds[CLASS].diversity_retained is None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"triggers": ["a", "b"]}, "`triggers` must be a word for each of 1 adapters"),
        ({"triggers": "sks"}, "`triggers`"),
        ({"class_words": [""]}, "`class_words`"),
        ({"limit": 0}, "`limit` must be at least 1"),
        ({"scales": ()}, "`scales`"),
        ({"scales": (1.0, 1.0)}, "`scales` must be finite numbers that differ"),
        ({"scales": (float("nan"),)}, "`scales`"),
        ({"max_drift": 1.0}, "`max_drift`"),
        ({"adapters": {"mine": 3}}, "`adapters`"),
        ({"adapters": {"base": "x"}}, "none of them called base"),
        ({"prompts": {"class": "a cat"}}, "`prompts` must be texts by kind"),
    ],
)
def test_arguments_are_checked(settings: dict[str, Any], text: str, checked: Check) -> None:
    with pytest.raises(InvalidValueError, match=text):
        checked(**settings)


def test_a_pipeline_needs_an_encoder_and_no_adapter(pipeline: Any, named: Path, tiny_clip_dir: Path) -> None:
    with pytest.raises(InvalidValueError, match="`encoder` must be one, as there is a pipeline"):
        cat_rs.check({"mine": named}, pipeline)
    with pytest.raises(InvalidValueError, match="`pipeline` must be a diffusers pipeline or None"):
        cat_rs.check({"mine": named}, tiny_clip_dir, tiny_clip_dir)
    pipeline.load_lora_weights(named)
    with pytest.raises(EvaluationInputError, match="got one with the adapters"):
        cat_rs.check({"mine": named}, pipeline, tiny_clip_dir)


def test_the_result_is_read_back(checked: Check, tmp_path: Path) -> None:
    for result in (checked(), checked(config=replace(CONFIG, seeds=(3,)))):
        result.save(tmp_path / "check.json")
        assert CheckResult.load(tmp_path / "check.json").to_json() == result.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "cat-rs check 1"}', '{"format": "cat-rs evaluation 1"}'])
def test_other_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "check.json").write_text(text)
    with pytest.raises(EvaluationInputError, match="result: expected"):
        CheckResult.load(tmp_path / "check.json")
