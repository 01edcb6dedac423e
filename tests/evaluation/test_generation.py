"""Generation: the same picture in any batch, adapters loaded and taken away again."""

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

import cat_rs
from cat_rs.evaluation import (
    EvaluationConfig,
    EvaluationFileError,
    EvaluationInputError,
    ScaledAdapter,
    adapter_loaded,
    generate_pictures,
    save_pictures,
)
from cat_rs.evaluation.generation import (
    adapters_loaded,
    generate_batch,
    generate_latents,
    picture_generator,
    request_batches,
)

from .conftest import write_adapter

PROMPTS = ["a cat", "a red background", "a dog"]


def test_batching_does_not_change_a_picture(pipeline: Any, config: EvaluationConfig) -> None:
    one = generate_pictures(pipeline, PROMPTS, replace(config, batch_size=1), progress=False)
    many = generate_pictures(pipeline, PROMPTS, config, progress=False)
    torch.testing.assert_close(one.latents, many.latents, rtol=0, atol=1e-4)
    for left, right in zip(one.images, many.images, strict=True):
        # Rounding to 8 bits can turn a difference of 1e-6 into one step.
        assert np.abs(np.asarray(left, dtype=int) - np.asarray(right, dtype=int)).max() <= 1


def test_pictures_differ_by_prompt_and_seed(pipeline: Any, config: EvaluationConfig) -> None:
    grid = generate_pictures(pipeline, PROMPTS, config, progress=False)
    assert len(grid.images) == len(PROMPTS) * len(config.seeds) == len(grid.latents)
    assert len({image.tobytes() for image in grid.images}) == len(grid.images)


def test_latents_alone_are_those_of_the_pictures(
    pipeline: Any, config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = request_batches(PROMPTS, config)[0]
    expected = generate_batch(pipeline, requests, config).latents
    monkeypatch.setattr(pipeline.vae, "decode", lambda *_, **__: pytest.fail("decoded"))
    assert torch.equal(generate_latents(pipeline, requests, config), expected)


def test_a_prompt_more_leaves_the_others_alone(pipeline: Any, config: EvaluationConfig) -> None:
    few = generate_pictures(pipeline, PROMPTS[:2], config, progress=False)
    more = generate_pictures(pipeline, PROMPTS, config, progress=False)
    torch.testing.assert_close(more.latents[: len(few.latents)], few.latents, rtol=0, atol=1e-4)


def test_generator_depends_on_prompt_and_seed_only() -> None:
    def draw(prompt: int, seed: int) -> float:
        return torch.rand(1, generator=picture_generator(prompt, seed)).item()

    assert draw(2, 7) == draw(2, 7)
    assert len({draw(prompt, seed) for prompt in range(5) for seed in range(5)}) == 25


def test_grid_is_addressed_by_prompt_and_seed(pipeline: Any, config: EvaluationConfig) -> None:
    grid = generate_pictures(pipeline, PROMPTS, config, progress=False)
    alone = generate_pictures(pipeline, PROMPTS, replace(config, seeds=(config.seeds[2],)), progress=False)
    difference = np.asarray(grid.picture(1, 2), dtype=int) - np.asarray(alone.picture(1, 0), dtype=int)
    assert np.abs(difference).max() <= 1


def test_adapter_is_loaded_and_unloaded(pipeline: Any, config: EvaluationConfig, adapter_dir: Path) -> None:
    before = generate_pictures(pipeline, PROMPTS, config, progress=False)
    adapted = generate_pictures(pipeline, PROMPTS, config, adapter=adapter_dir, progress=False)
    after = generate_pictures(pipeline, PROMPTS, config, progress=False)
    assert (adapted.latents - before.latents).abs().max() > 0.01
    assert torch.equal(before.latents, after.latents)


def test_adapters_are_loaded_at_their_scales(
    pipeline: Any, config: EvaluationConfig, adapter_dir: Path, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    def drawn(*adapters: ScaledAdapter) -> torch.Tensor:
        with adapters_loaded(pipeline, adapters):
            batches = [generate_batch(pipeline, each, config) for each in request_batches(PROMPTS, config)]
        return torch.cat([batch.latents for batch in batches])

    other = write_adapter(tiny_pipeline_dir, tmp_path / "other", seed=5)
    for paths, scales in (([adapter_dir], [0.5]), ([adapter_dir, other], [0.7, 0.2])):
        file = cat_rs.save_lora(tmp_path / "merged.safetensors", cat_rs.merge_loras(paths, scales).lora)
        torch.testing.assert_close(drawn(*map(ScaledAdapter, paths, scales)), drawn(ScaledAdapter(file)))
    assert torch.equal(drawn(ScaledAdapter(adapter_dir, 0.0)), drawn())
    assert not torch.equal(drawn(ScaledAdapter(adapter_dir, 0.5)), drawn(ScaledAdapter(adapter_dir)))


def test_adapter_is_unloaded_after_an_error(pipeline: Any, adapter_dir: Path) -> None:
    with pytest.raises(KeyboardInterrupt), adapter_loaded(pipeline, adapter_dir):
        raise KeyboardInterrupt
    assert pipeline.get_list_adapters() == {}


def test_dropout_of_an_adapter_is_off(pipeline: Any, config: EvaluationConfig, tmp_path: Path) -> None:
    from peft import LoraConfig

    pipeline.unet.add_adapter(LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["to_q"]))
    file = cat_rs.save_lora(tmp_path, pipeline.unet)
    pipeline.unload_lora_weights()
    with adapter_loaded(pipeline, file):
        dropouts = [module for module in pipeline.unet.modules() if isinstance(module, torch.nn.Dropout) and module.p]
        assert {(module.p, module.training) for module in dropouts} == {(0.5, False)}
    first, second = (generate_pictures(pipeline, PROMPTS, config, adapter=file, progress=False) for _ in range(2))
    assert torch.equal(first.latents, second.latents)


def test_pipeline_with_an_adapter_is_refused(pipeline: Any, config: EvaluationConfig, adapter_dir: Path) -> None:
    pipeline.load_lora_weights(adapter_dir, adapter_name="mine")
    with pytest.raises(EvaluationInputError, match=r"got one with the adapters \['mine'\]"):
        generate_pictures(pipeline, PROMPTS, config, progress=False)


def test_progress_bar_setting_of_the_pipeline_is_kept(pipeline: Any, config: EvaluationConfig) -> None:
    pipeline.set_progress_bar_config(desc="mine")
    generate_pictures(pipeline, PROMPTS[:1], config, progress=False)
    assert pipeline._progress_bar_config == {"desc": "mine"}


def test_the_progress_bar_counts_every_picture(
    pipeline: Any, config: EvaluationConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_pictures(pipeline, PROMPTS, replace(config, seeds=(0, 1, 2)))
    assert "100%" in (last := capsys.readouterr().err.splitlines()[-1])
    assert "9/9" in last


def test_missing_broken_and_foreign_adapters_are_named(pipeline: Any, tmp_path: Path) -> None:
    cases = {
        "absent": (EvaluationFileError, "expected a safetensors file or a folder"),
        "broken.safetensors": (EvaluationFileError, r"broken\.safetensors cannot be loaded"),
        "foreign.safetensors": (EvaluationInputError, "expected a LoRA for StableDiffusionPipeline"),
    }
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    weights = {"transformer.x.lora_A.weight": torch.zeros(2, 4), "transformer.x.lora_B.weight": torch.zeros(4, 2)}
    save_file(weights, tmp_path / "foreign.safetensors")
    for name, (error, text) in cases.items():
        with pytest.raises(error, match=text), adapter_loaded(pipeline, tmp_path / name):
            pass
    assert pipeline.get_list_adapters() == {}


def test_other_pipelines_generate_too(tiny_sdxl_pipeline_dir: Path, config: EvaluationConfig) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_pipeline_dir, add_watermarker=False)
    grid = generate_pictures(pipeline, PROMPTS[:2], config, progress=False)
    assert len({image.tobytes() for image in grid.images}) == len(grid.images) == len(grid.latents)


def test_loading_an_adapter_for_the_unet_alone_is_silent(
    pipeline: Any, adapter_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with adapter_loaded(pipeline, adapter_dir):
        assert "No LoRA keys" not in capfd.readouterr().err


def test_saved_pictures_read_back(pipeline: Any, config: EvaluationConfig, tmp_path: Path) -> None:
    grid = generate_pictures(pipeline, PROMPTS[:2], config, progress=False)
    files = save_pictures(grid, tmp_path / "new" / "folder")
    rows = [json.loads(line) for line in (tmp_path / "new" / "folder" / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [file.name for file in files]
    assert rows[4] == {"file_name": "001_seed1.png", "text": "a red background", "seed": 1}
    assert np.array_equal(Image.open(files[4]), grid.picture(1, 1))


def test_settings_that_the_pipeline_refuses_are_told(pipeline: Any, config: EvaluationConfig) -> None:
    with pytest.raises(EvaluationInputError, match="got: `height` and `width` have to be divisible by 8 but are 33"):
        generate_pictures(pipeline, ["a cat"], replace(config, height=33, width=32), progress=False)
    with pytest.raises(
        EvaluationInputError, match="height, width: expected both or none, got height 32 and width None"
    ):
        generate_pictures(pipeline, ["a cat"], replace(config, height=32), progress=False)


def test_no_prompts_are_refused(pipeline: Any, config: EvaluationConfig) -> None:
    with pytest.raises(EvaluationInputError, match="prompts: expected at least one"):
        generate_pictures(pipeline, [], config, progress=False)


def test_pictures_that_a_safety_checker_blacked_out_are_named(pipeline: Any, config: EvaluationConfig) -> None:
    from transformers import CLIPImageProcessor

    class Checker(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
            return images * 0, [index == 1 for index in range(len(images))]

    pipeline.register_modules(safety_checker=Checker(), feature_extractor=CLIPImageProcessor(crop_size=64, size=64))
    with pytest.raises(EvaluationInputError, match=r"blacked out for 'a', seed 1; set pipeline.safety_checker = None"):
        generate_pictures(pipeline, ["a"], replace(config, seeds=(0, 1), batch_size=2), progress=False)
