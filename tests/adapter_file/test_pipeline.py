"""Adapters in pipelines: every format gives the same pictures, and the pipeline is as it was found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cat_rs
from cat_rs.cli import main
from cat_rs.evaluation import (
    EvaluationConfig,
    EvaluationFileError,
    EvaluationInputError,
    adapter_loaded,
    generate_pictures,
)
from tests.models import add_lora, tiny_unet

EMOJI_MODEL = Path(__file__).parents[2] / "examples" / "emoji_model" / "model"
CONFIG = EvaluationConfig(num_inference_steps=2, guidance_scale=2.0, seeds=(0, 1), batch_size=4)
ALPHAS = {"to_v": 1, "to_q": 3, "to_out.0": 12}

Save = Callable[[Any, str], Path]


def sd(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)


@pytest.fixture(params=["tiny", "emoji", "sdxl"])
def pipeline(request: pytest.FixtureRequest, tiny_pipeline_dir: Path) -> Any:
    if request.param == "sdxl":
        from diffusers import StableDiffusionXLPipeline

        folder = request.getfixturevalue("sdxl_dir")
        return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    return sd(tiny_pipeline_dir if request.param == "tiny" else EMOJI_MODEL)


@pytest.fixture
def tiny(tiny_pipeline_dir: Path) -> Any:
    return sd(tiny_pipeline_dir)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes an adapter of a U-Net and its text encoder, with alphas that differ among attention layers."""

    def save_as(pipeline: Any, format: str) -> Path:
        unet, text_encoder = copy.deepcopy((pipeline.unet, pipeline.text_encoder))
        add_lora(unet, alpha_pattern=ALPHAS, r=4, lora_alpha=8)
        add_lora(text_encoder, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 2}, r=4, lora_alpha=8)
        path = tmp_path / (format if format == "peft" else f"{format}.safetensors")
        return cat_rs.save_lora(path, unet, text_encoder=text_encoder, format=format)

    return save_as


def latents(pipeline: Any, adapter: Path | None) -> torch.Tensor:
    return generate_pictures(pipeline, ["a sks cat", "a dog"], CONFIG, adapter=adapter, progress=False).latents


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_every_format_gives_the_same_pictures(pipeline: Any, format: str, save: Save) -> None:
    expected = latents(pipeline, save(pipeline, "diffusers"))
    assert (expected - latents(pipeline, None)).abs().max() > 1e-2
    torch.testing.assert_close(latents(pipeline, save(pipeline, format)), expected, rtol=0, atol=1e-5)


def test_pictures_are_those_of_the_model_with_its_adapter(tiny: Any, tmp_path: Path) -> None:
    unet = add_lora(copy.deepcopy(tiny.unet), alpha_pattern=ALPHAS, use_rslora=True)
    file = cat_rs.save_lora(tmp_path / "peft", unet, format="peft")
    base, tiny.unet = tiny.unet, unet
    prompt = {"prompt": "a sks cat", "num_inference_steps": 2, "output_type": "latent"}
    expected = tiny(**prompt, generator=torch.Generator().manual_seed(0)).images
    tiny.unet = base
    with adapter_loaded(tiny, file):
        found = tiny(**prompt, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(found, expected)


def state_of(pipeline: Any) -> dict[str, Any]:
    """What an adapter could leave behind."""
    found: dict[str, Any] = {"random": torch.get_rng_state().tolist(), "adapters": pipeline.get_list_adapters()}
    for part in ("unet", "text_encoder"):
        model = getattr(pipeline, part)
        found[part] = (
            {name: (id(module), module.training) for name, module in model.named_modules()},
            {name: (id(weight), weight.requires_grad) for name, weight in model.named_parameters()},
            hasattr(model, "peft_config"),
            bool(model._hf_peft_config_loaded),
        )
    return found


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_the_pipeline_is_left_as_it_was(tiny: Any, format: str, save: Save) -> None:
    tiny.unet.requires_grad_(True)
    tiny.unet.conv_in.requires_grad_(False)
    tiny.unet.mid_block.train()
    path = save(tiny, format)
    before = state_of(tiny)
    with adapter_loaded(tiny, path):
        assert list(tiny.get_list_adapters()) == ["unet", "text_encoder"]
    assert state_of(tiny) == before
    with pytest.raises(KeyboardInterrupt), adapter_loaded(tiny, path):
        raise KeyboardInterrupt
    assert state_of(tiny) == before


def test_layers_have_the_mode_of_what_they_adapt(tiny: Any, tmp_path: Path) -> None:
    file = cat_rs.save_lora(tmp_path, add_lora(copy.deepcopy(tiny.unet), lora_dropout=0.5))
    tiny.unet.mid_block.train()
    with adapter_loaded(tiny, file):
        dropouts = {
            (name.startswith("mid_block"), module.training)
            for name, module in tiny.unet.named_modules()
            if isinstance(module, torch.nn.Dropout) and module.p == 0.5
        }
    assert dropouts == {(True, True), (False, False)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pipelines_of_low_precision(tiny: Any, dtype: torch.dtype, save: Save) -> None:
    file = save(tiny, "diffusers")
    tiny.to(dtype)
    with adapter_loaded(tiny, file):
        assert latents_of(tiny).isfinite().all()


def latents_of(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a sks cat", num_inference_steps=2, generator=generator, output_type="latent").images


def test_what_does_not_fit_is_an_input_error_and_leaves_nothing(tiny: Any, tmp_path: Path) -> None:
    wide = cat_rs.save_lora(tmp_path / "wide.safetensors", add_lora(tiny_unet(cross_attention_dim=24)))
    names = {f"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_{part}.weight" for part in "AB"}
    shapes = {"A": (2, 16), "B": (32, 2)}
    second = tmp_path / "second.safetensors"
    unet = load_file(cat_rs.save_lora(second, add_lora(copy.deepcopy(tiny.unet))))
    save_file(unet | {name: torch.ones(shapes[name[-8]]) for name in names}, second)
    before = state_of(tiny)
    for file, text in [
        (wide, r"wide\.safetensors: .*attn2.to_k has weight \[16, 16\]"),
        (second, "expected a LoRA for StableDiffusionPipeline, which has .*, got one with layers of text_encoder_2"),
    ]:
        with pytest.raises(EvaluationInputError, match=text), adapter_loaded(tiny, file):
            pass
        assert state_of(tiny) == before


def test_an_incomplete_peft_folder_is_a_file_error(tiny: Any, save: Save) -> None:
    folder = save(tiny, "peft")
    (folder / "unet" / "adapter_config.json").unlink()
    with pytest.raises(EvaluationFileError, match=r"adapter_config\.json"), adapter_loaded(tiny, folder):
        pass
    (folder / "unet" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(EvaluationFileError, match="expected peft_type LORA"), adapter_loaded(tiny, folder):
        pass


def test_offloaded_layer_by_layer(tiny: Any, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import cpu_offload

    def offload(pipeline: Any) -> None:
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
            cpu_offload(part, torch.device("cpu"))

    file = save(tiny, "diffusers")
    expected = [latents(tiny, adapter) for adapter in (file, None)]
    # diffusers' own wants an accelerator.
    monkeypatch.setattr(type(tiny), "enable_sequential_cpu_offload", offload)
    tiny.enable_sequential_cpu_offload()
    assert tiny.unet.conv_in.weight.is_meta
    for adapter, right in zip((file, None), expected, strict=True):
        assert torch.equal(latents(tiny, adapter), right)
    assert tiny.unet.conv_in.weight.is_meta


def test_offloaded_in_groups(tiny: Any, save: Save) -> None:
    file = save(tiny, "diffusers")
    expected = [latents(tiny, adapter) for adapter in (file, None)]
    cpu = torch.device("cpu")
    tiny.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    for adapter, right in zip((file, None), expected, strict=True):
        assert torch.equal(latents(tiny, adapter), right)


def test_generate_takes_every_format(tiny_pipeline_dir: Path, tiny: Any, save: Save, tmp_path: Path) -> None:
    sizes = ["--inference-steps", "1", "--picture-seeds", "0", "--device", "cpu"]
    pictures = set()
    for format in ("diffusers", "kohya", "peft"):
        words = ["--model", str(tiny_pipeline_dir), "--prompt", "a sks cat", "--adapter", str(save(tiny, format))]
        assert main(["generate", *words, *sizes, "--output-dir", str(tmp_path / "drawn" / format)]) == 0
        pictures.add((tmp_path / "drawn" / format / "000_seed0.png").read_bytes())
    assert len(pictures) == 1
