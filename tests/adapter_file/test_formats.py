"""Adapter files of every format, against the libraries that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cat_rs
from cat_rs.cli import main
from tests.models import add_lora, randomize_b, tiny_unet

from .models import FORMATS, PATHS, UNET_LAYERS, add_text_lora, assert_same_scales, assert_same_state, encoders_of

Pipeline = Any
Load = Callable[[], Pipeline]


@pytest.fixture(params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def load(family: str, tiny_pipeline_dir: Path, sdxl_dir: Path) -> Load:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    def build() -> Pipeline:
        if family == "sd":
            pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
        else:
            pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_dir, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


def adapted(pipeline: Pipeline, *, one_alpha: bool = False) -> dict[str, Any]:
    """Adds random adapters; returns the text encoders as save_lora and load_lora take them."""
    options = {"r": 2, "lora_alpha": 6}
    alphas: list[dict[str, int]] = [{}, {}] if one_alpha else [{"to_v": 1, "conv1": 3}, {"fc1": 5}]
    ranks = {"to_q": 3, "conv1": 1}
    add_lora(pipeline.unet, target_modules=UNET_LAYERS, rank_pattern=ranks, alpha_pattern=alphas[0], **options)
    encoders = encoders_of(pipeline)
    for number, encoder in enumerate(encoders.values()):
        add_text_lora(encoder, seed=5 + number, alpha_pattern=alphas[1], **options)
    return encoders


def draw(pipeline: Pipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a sks cat", num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="np"
    ).images[0]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_diffusers_draws_the_same_picture(format: str, family: str, load: Load, tmp_path: Path) -> None:
    pipeline = load()
    base = draw(pipeline)
    # diffusers' reader of kohya files does not match the alphas of attention layers with their names.
    encoders = adapted(pipeline, one_alpha=format == "kohya")
    expected = draw(pipeline)
    assert np.abs(expected - base).max() > 1e-2
    file = cat_rs.save_lora(tmp_path / "a.safetensors", pipeline.unet, format=format, **encoders)
    other = load()
    other.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="default")
    assert np.abs(draw(other) - expected).max() < 1e-5
    for name in ("unet", *encoders):
        assert_same_state(getattr(other, name), getattr(pipeline, name))
        assert_same_scales(getattr(other, name), getattr(pipeline, name))


@pytest.mark.parametrize("format", FORMATS)
def test_load_lora_gives_the_same_picture(format: str, load: Load, tmp_path: Path) -> None:
    pipeline = load()
    encoders = adapted(pipeline)
    written = cat_rs.save_lora(tmp_path / PATHS[format], pipeline.unet, format=format, **encoders)
    other = load()
    lora = cat_rs.load_lora(written, model=other.unet, **encoders_of(other))
    assert lora.format == format
    assert np.array_equal(draw(other), draw(pipeline))
    for name in ("unet", *encoders):
        assert_same_state(getattr(other, name), getattr(pipeline, name))


def test_every_conversion_keeps_every_bit(load: Load, family: str, tmp_path: Path) -> None:
    pipeline = load()
    encoders = adapted(pipeline)
    path = cat_rs.save_lora(tmp_path / "0.safetensors", pipeline.unet, **encoders)
    for number, format in enumerate(["kohya", "peft", "diffusers", "peft", "kohya", "diffusers"], start=1):
        target = tmp_path / (str(number) if format == "peft" else f"{number}.safetensors")
        options = ["--family", family] if format == "kohya" else []
        assert main(["convert", str(path), str(target), "--to", format, *options]) == 0
        path = target
    first, last = load_file(tmp_path / "0.safetensors"), load_file(path)
    assert first.keys() == last.keys()
    assert all(torch.equal(tensor, last[name]) for name, tensor in first.items())
    other = load()
    other.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert np.abs(draw(other) - draw(pipeline)).max() < 1e-5


def test_kohya_names_are_those_of_its_trainer(load: Load, family: str, tmp_path: Path) -> None:
    pipeline = load()
    encoders = adapted(pipeline)
    names = {
        name.split(".")[0]
        for name in load_file(cat_rs.save_lora(tmp_path / "a.safetensors", pipeline.unet, format="kohya", **encoders))
    }
    expected = {
        "sd": {
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
            "lora_unet_up_blocks_0_resnets_1_conv_shortcut",
            "lora_unet_down_blocks_0_downsamplers_0_conv",
            "lora_unet_conv_in",
            "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
            "lora_te_text_model_encoder_layers_0_mlp_fc2",
        },
        "sdxl": {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
            "lora_unet_input_blocks_8_1_transformer_blocks_1_ff_net_0_proj",
            "lora_unet_output_blocks_2_2_conv",
            "lora_unet_input_blocks_3_0_op",
            "lora_unet_middle_block_1_proj_in",
            "lora_unet_output_blocks_8_0_skip_connection",
            "lora_te1_text_model_encoder_layers_1_self_attn_q_proj",
            "lora_te2_text_model_encoder_layers_0_mlp_fc2",
        },
    }
    assert expected[family] <= names


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_without_alpha_have_scale_one(format: str, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    unet = add_lora(tiny_unet(), lora_alpha=4)
    path = tmp_path / PATHS[format]
    cat_rs.save_lora(path, get_peft_model_state_dict(unet), format=format, family="sd")
    other = tiny_unet()
    cat_rs.load_lora(path, model=other)
    assert_same_state(other, unet)
    assert_same_scales(other, unet)


def test_older_files_of_diffusers_are_read(tmp_path: Path) -> None:
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    layer = "text_encoder.text_model.encoder.layers.0.self_attn"
    save_file(
        {
            f"{block}.processor.to_out_lora.down.weight": down,
            f"{block}.processor.to_out_lora.up.weight": up,
            f"{layer}.q_proj.lora_linear_layer.down.weight": down.clone(),
            f"{layer}.q_proj.lora_linear_layer.up.weight": up.clone(),
        },
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    lora = cat_rs.load_lora(tmp_path)
    assert lora.format == "diffusers"
    assert set(lora.state) == {"unet", "text_encoder"}
    assert torch.equal(
        lora.state["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight"], down
    )
    assert lora.alphas["text_encoder"] == {"text_model.encoder.layers.0.self_attn.q_proj": 2}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_the_same_adapter_gives_the_same_bytes(format: str, tmp_path: Path) -> None:
    model = add_lora(tiny_unet())
    randomize_b(model)
    training = {"base_model": "tiny", "trigger": {"sks": "cat"}, "steps": 3, "lr": 1e-4, "rank": 4}
    file = tmp_path / "adapter.safetensors"

    def written() -> bytes:
        cat_rs.save_lora(file, model, format=format, family="sd", metadata=training)
        return file.read_bytes()

    first = written()
    assert all(written() == first for _ in range(5))
    length = int.from_bytes(first[:8], "little")
    assert length % 8 == 0
    with safe_open(file, "pt") as opened:
        assert list(opened.keys())
