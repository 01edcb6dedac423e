"""`evaluate` from end to end on a tiny random pipeline, and the JSON of its result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cat_rs.evaluation import (
    EvaluationConfig,
    EvaluationFileError,
    EvaluationInputError,
    EvaluationPrompts,
    EvaluationResult,
    Interval,
    KpsEvaluator,
    Scores,
    evaluate,
)

from .conftest import CountingPipeline


@pytest.fixture
def result(
    pipeline: Any,
    adapter_dir: Path,
    tiny_clip_dir: Path,
    prompts: EvaluationPrompts,
    config: EvaluationConfig,
    concept_images: list[Image.Image],
) -> EvaluationResult:
    """Two names for one adapter, and the base model as a control."""
    return evaluate(
        pipeline,
        {"mine": adapter_dir, "again": adapter_dir / "pytorch_lora_weights.safetensors", "control": None},
        prompts,
        tiny_clip_dir,
        concept_images=concept_images,
        config=config,
        progress=False,
    )


def test_same_adapter_scores_the_same_and_the_base_scores_one(result: EvaluationResult) -> None:
    assert result.adapters["mine"] == result.adapters["again"]
    control, mine = result.adapters["control"], result.adapters["mine"]
    assert control.ups is not None
    assert mine.ups is not None
    assert mine.pixel_rmse is not None
    assert (control.ups.value, control.pixel_rmse) == (pytest.approx(1, abs=1e-6), Interval(0, 0, 0))
    assert control.identity == result.base.identity
    assert mine.ups.value < control.ups.value
    assert mine.pixel_rmse.value > 0


def test_every_measure_has_an_interval(result: EvaluationResult) -> None:
    for name, interval in vars(result.adapters["mine"]).items():
        assert interval is not None, name
        assert interval.low <= interval.value <= interval.high, name


def test_pictures_of_the_result_are_those_that_were_scored(
    result: EvaluationResult, tiny_clip_dir: Path, concept_images: list[Image.Image]
) -> None:
    pictures = result.pictures
    assert pictures is not None
    mine = pictures.adapters["mine"]
    sides = (pictures.base.no_trigger, mine.no_trigger, pictures.base.trigger, mine.trigger)
    score = KpsEvaluator(tiny_clip_dir).score(*(grid.images for grid in sides))
    scores = result.adapters["mine"]
    assert scores.ups is not None
    assert scores.kps is not None
    assert (scores.ups.value, scores.kps.value) == pytest.approx((score.ups, score.kps), abs=1e-6)
    assert len(pictures.concept) == len(concept_images)


def test_base_pictures_are_generated_once(
    pipeline: Any,
    adapter_dir: Path,
    tiny_clip_dir: Path,
    prompts: EvaluationPrompts,
    config: EvaluationConfig,
    concept_images: list[Image.Image],
) -> None:
    counting = CountingPipeline(pipeline)
    adapters = {"one": adapter_dir, "two": adapter_dir}
    evaluate(counting, adapters, prompts, tiny_clip_dir, concept_images=concept_images, config=config, progress=False)
    one_model = (len(prompts.trigger) + len(prompts.no_trigger)) * len(config.seeds)
    by_base = sum(count for loaded, count in counting.pictures if not loaded)
    by_adapters = sum(count for loaded, count in counting.pictures if loaded)
    assert (by_base, by_adapters) == (one_model, 2 * one_model)
    assert pipeline.get_list_adapters() == {}


def test_batch_size_does_not_change_the_scores(
    pipeline: Any,
    adapter_dir: Path,
    tiny_clip_dir: Path,
    prompts: EvaluationPrompts,
    config: EvaluationConfig,
    concept_images: list[Image.Image],
) -> None:
    def ups(batch_size: int) -> float:
        result = evaluate(
            pipeline,
            {"mine": adapter_dir},
            prompts,
            KpsEvaluator(tiny_clip_dir, batch_size=batch_size),
            concept_images=concept_images,
            config=replace(config, batch_size=batch_size),
            progress=False,
        )
        scores = result.adapters["mine"]
        assert scores.ups is not None
        return scores.ups.value

    # The pictures may differ by one step of 8 bits.
    assert ups(1) == pytest.approx(ups(5), abs=1e-3)


def test_json_round_trip(result: EvaluationResult, tmp_path: Path) -> None:
    result.save(tmp_path / "results.json")
    loaded = EvaluationResult.load(tmp_path / "results.json")
    assert loaded == result
    assert loaded.pictures is None
    assert loaded.to_json() == result.to_json()
    content = json.loads(result.to_json())
    assert content["format"] == "cat-rs evaluation 1"
    assert content["settings"]["sampling"]["seeds"] == [0, 1, 5]


def test_missing_bounds_survive_the_round_trip() -> None:
    scores = Scores(ups=Interval(0.5, float("nan"), float("nan")))
    result = EvaluationResult({}, Scores(), None, {"mine": scores}, ())
    ups = EvaluationResult.from_json(result.to_json()).adapters["mine"].ups
    assert ups is not None
    assert ups.value == 0.5
    assert np.isnan([ups.low, ups.high]).all()


def test_saving_replaces_the_file_as_a_whole(result: EvaluationResult, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("old")
    result.save(file)
    assert EvaluationResult.load(file) == result
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "cat-rs evaluation 99"}', '{"format": 3}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(EvaluationInputError, match="result: expected"):
        EvaluationResult.from_json(text)


@pytest.mark.parametrize("part", ["settings", "base", "adapters", "prompts"])
@pytest.mark.parametrize("value", [None, "text", 3])
def test_a_part_of_another_kind_is_refused(part: str, value: object) -> None:
    content = json.loads(EvaluationResult({}, Scores(), None, {}, ()).to_json())
    with pytest.raises(EvaluationInputError, match="result: expected"):
        EvaluationResult.from_json(json.dumps({**content, part: value}))


@pytest.mark.parametrize("row", [None, "text", [], {"model": "mine"}])
def test_a_row_of_another_kind_is_refused(row: object) -> None:
    content = json.loads(EvaluationResult({}, Scores(), None, {}, ()).to_json())
    with pytest.raises(EvaluationInputError, match="result: expected"):
        EvaluationResult.from_json(json.dumps({**content, "prompts": [row]}))


def test_a_file_from_before_a_measure_was_added_is_read() -> None:
    content = json.loads(EvaluationResult({}, Scores(ups=Interval(0.5, 0.4, 0.6)), None, {}, ()).to_json())
    del content["base"]["latent_rmse"]
    assert EvaluationResult.from_json(json.dumps(content)).base == Scores(ups=Interval(0.5, 0.4, 0.6))


def test_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationFileError, match=r"absent\.json cannot be read"):
        EvaluationResult.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("adapters", "error", "text"),
    [
        ({}, EvaluationInputError, "adapters: expected at least one"),
        ({"base": None}, EvaluationInputError, "expected a name other than 'base'"),
        ({"mine": "absent.safetensors"}, EvaluationFileError, r"absent\.safetensors cannot be loaded"),
        # The first of two would have cost its pictures.
        (
            {"mine": None, "other": "<sdxl>"},
            EvaluationInputError,
            r"expected a LoRA for \w*Pipeline, got one for sdxl: ",
        ),
    ],
)
def test_unusable_adapters_are_refused_before_generating(
    pipeline: Any,
    tiny_clip_dir: Path,
    prompts: EvaluationPrompts,
    concept_images: list[Image.Image],
    adapters: dict[str, str | None],
    error: type[Exception],
    text: str,
    tmp_path: Path,
) -> None:
    if "<sdxl>" in adapters.values():
        module = "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"
        weights = {f"{module}.lora_A.weight": torch.zeros(2, 2048), f"{module}.lora_B.weight": torch.zeros(1280, 2)}
        save_file(weights, tmp_path / "sdxl.safetensors")
        adapters = {**adapters, "other": str(tmp_path / "sdxl.safetensors")}
    counting = CountingPipeline(pipeline)
    with pytest.raises(error, match=text):
        evaluate(counting, adapters, prompts, tiny_clip_dir, concept_images=concept_images, progress=False)
    assert counting.pictures == []


def test_adapter_that_changes_the_size_is_named(
    counting: CountingPipeline,
    adapter_dir: Path,
    tiny_clip_dir: Path,
    prompts: EvaluationPrompts,
    config: EvaluationConfig,
    concept_images: list[Image.Image],
) -> None:
    class Cropping(CountingPipeline):
        def __call__(self, **arguments: Any) -> Any:
            output = super().__call__(**arguments)
            if self.pictures[-1][0]:
                output.images[-1] = output.images[-1].crop((0, 0, 16, 8))
            return output

    with pytest.raises(EvaluationInputError, match=r"got 16x16 of .* \(seed 0, base\) and 16x8 of .*seed 0, mine\)"):
        evaluate(
            Cropping(counting),
            {"mine": adapter_dir},
            prompts,
            tiny_clip_dir,
            concept_images=concept_images,
            config=config,
            progress=False,
        )


def test_useless_embedding_names_prompt_seed_and_model(
    pipeline: Any, prompts: EvaluationPrompts, config: EvaluationConfig, concept_images: list[Image.Image]
) -> None:
    import torch

    def blind_to_generated(images: list[Image.Image]) -> torch.Tensor:
        seen = 1.0 if images[0].size == concept_images[0].size else 0.0
        return torch.full((len(images), 2), seen)

    with pytest.raises(EvaluationInputError, match=r"picture 'a sks cat on a red background' \(seed 0, base\)"):
        evaluate(
            pipeline,
            {"control": None},
            prompts,
            blind_to_generated,
            concept_images=concept_images,
            config=config,
            progress=False,
        )
