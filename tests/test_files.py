"""Adapter files, against the libraries that read and write them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
from cat_rs.errors import AdapterError, InvalidValueError
from cat_rs.files import read_metadata
from tests.models import add_lora, randomize_b, tiny_unet

UNET_LAYERS = [
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "proj_in",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "conv_in",
    "time_embedding.linear_1",
]
CLIP_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FLUX_LAYERS = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "norm1.linear",
    "x_embedder",
]
SINGLE_LAYERS = ["proj_mlp", "norm.linear", r"single_transformer_blocks\.\d+\.proj_out"]
FORMATS = ["diffusers", "kohya", "peft"]
PATHS = {"diffusers": "a.safetensors", "kohya": "a.safetensors", "peft": "a"}

Pipeline = Any
Load = Callable[[], Pipeline]


# ---- pipelines with an adapter


@pytest.fixture(params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def sdxl_dir(tiny_sdxl_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL pipeline with SDXL's own layout of blocks, after which kohya's names count."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_pipeline_dir)
    torch.manual_seed(4)
    unet = UNet2DConditionModel.from_config(
        pipeline.unet.config,
        block_out_channels=(4, 8, 16),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("files") / "sdxl"
    StableDiffusionXLPipeline(**{**pipeline.components, "unet": unet}, add_watermarker=False).save_pretrained(folder)
    return folder


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


@pytest.fixture(autouse=True)
def _any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers asks for a newer PEFT than a text encoder's LoRA needs, and than may be installed."""
    from transformers.integrations import peft

    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "0.15.0")


def add_text_lora(encoder: Any, *, seed: int, **settings: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    encoder.add_adapter(LoraConfig(target_modules=CLIP_LAYERS, **settings), "default")
    randomize_b(encoder)


def encoders_of(pipeline: Pipeline) -> dict[str, Any]:
    names = ("text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def draw(pipeline: Pipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a sks cat", num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="np"
    ).images[0]


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


def assert_same_state(left: torch.nn.Module, right: torch.nn.Module) -> None:
    left_state, right_state = state_of(left), state_of(right)
    assert left_state.keys() == right_state.keys()
    for name, tensor in left_state.items():
        assert torch.equal(tensor, right_state[name]), name


def assert_same_scales(left: torch.nn.Module, right: torch.nn.Module) -> None:
    def scales(model: torch.nn.Module) -> dict[str, float]:
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "scaling")}
        return {name: layer.scaling["default"] for name, layer in layers.items()}

    assert scales(left) == pytest.approx(scales(right))


# ---- diffusers and kohya, read by diffusers


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


# ---- FLUX


def flux_transformer(seed: int = 6, **settings: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    options = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxTransformer2DModel(**options | settings).requires_grad_(False)


def run_flux(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        return transformer(
            hidden_states=random(1, 4, 4),
            encoder_hidden_states=random(1, 3, 16),
            pooled_projections=random(1, 16),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


def flux_pipeline(transformer: Any, text_encoder: Any = None) -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=text_encoder,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(8)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).requires_grad_(False).eval()


def flux_with_lora(layers: list[str], **settings: Any) -> Any:
    pattern = "|".join(layer if "\\" in layer else layer.replace(".", r"\.") for layer in layers)
    return add_lora(flux_transformer(), target_modules=rf"(?:.*\.)?(?:{pattern})", **settings)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_diffusers_reads_flux(format: str, tmp_path: Path) -> None:
    # diffusers' reader of kohya files takes single blocks of FLUX's own width only: see the next test.
    layers = [layer.replace("attn.", r"^transformer_blocks\.\d+\.attn\.") for layer in FLUX_LAYERS]
    # Of layers outside the blocks it loses the prefix, without which they are not loaded.
    pattern = "|".join(layer for layer in layers if format == "diffusers" or layer != "x_embedder")
    transformer = add_lora(flux_transformer(), target_modules=rf"(?:.*\.)?(?:{pattern})", r=2)
    assert any("transformer_blocks.1.attn.add_q_proj.lora_B" in name for name in state_of(transformer))
    encoder = clip()
    add_text_lora(encoder, seed=7, r=2, lora_alpha=6)
    file = cat_rs.save_lora(tmp_path / "a.safetensors", transformer, format=format, text_encoder=encoder)
    pipeline = flux_pipeline(flux_transformer(), clip())
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected = run_flux(transformer)
    assert (run_flux(flux_transformer()) - expected).abs().max() > 1e-2
    torch.testing.assert_close(run_flux(pipeline.transformer), expected, atol=1e-5, rtol=1e-4)
    ids = torch.tensor([[0, 5, 7, 1]])
    torch.testing.assert_close(
        pipeline.text_encoder(ids).last_hidden_state, encoder(ids).last_hidden_state, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"attn.to_q": 4}, "alpha_pattern": {"attn.to_k": 3}}])
@pytest.mark.parametrize("layers", [["attn.to_q", "attn.to_k"], [*FLUX_LAYERS, *SINGLE_LAYERS]])
def test_flux_comes_back_from_kohya(layers: list[str], settings: dict[str, Any], tmp_path: Path) -> None:
    transformer = flux_with_lora(layers, r=2, lora_alpha=4, **settings)
    file = cat_rs.save_lora(tmp_path / "a.safetensors", transformer, format="kohya")
    other = flux_transformer()
    lora = cat_rs.load_lora(file, model=other)
    assert lora.family == "flux"
    torch.testing.assert_close(run_flux(other), run_flux(transformer), atol=1e-5, rtol=1e-4)
    if not settings:
        assert_same_state(other, transformer)
        assert_same_scales(other, transformer)


def test_diffusers_takes_joined_single_blocks_apart(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    width, wide = 3072, 12288
    block = "transformer.single_transformer_blocks.5"
    sizes = {"attn.to_q": width, "attn.to_k": width, "attn.to_v": width, "proj_mlp": wide}
    state = {}
    for name, rows in sizes.items():
        state[f"{block}.{name}.lora_A.weight"] = torch.randn(2, width)
        state[f"{block}.{name}.lora_B.weight"] = torch.randn(rows, 2)
        state[f"{block}.{name}.alpha"] = torch.tensor(4.0)
    file = cat_rs.save_lora(tmp_path / "a.safetensors", state, format="kohya")
    assert set(load_file(file)) == {
        f"lora_unet_single_blocks_5_linear1.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    found = FluxPipeline.lora_state_dict(str(tmp_path), weight_name=file.name)
    for name in sizes:
        # diffusers folds alpha / r, here 2, into A.
        assert torch.equal(found[f"{block}.{name}.lora_A.weight"], 2 * state[f"{block}.{name}.lora_A.weight"])
        assert torch.equal(found[f"{block}.{name}.lora_B.weight"], state[f"{block}.{name}.lora_B.weight"])


# ---- PEFT


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    from peft import PeftModel

    unet = add_lora(tiny_unet(), target_modules=UNET_LAYERS, rank_pattern={"to_q": 3}, use_rslora=True)
    folder = cat_rs.save_lora(tmp_path / "peft", unet, format="peft", metadata={"trigger": "sks"})
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(tiny_unet(), folder)
    assert_same_output(loaded, unet)
    assert read_metadata(folder) == {"trigger": "sks"}


# PEFT's own writer warns of biases of B, as of a matrix that lost a dimension.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_peft_folders_come_back(settings: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=3, target_modules=["to_out.0", "conv1"], rank_pattern={"conv1": 2}, **settings)
    model = get_peft_model(tiny_unet(), config)
    torch.manual_seed(2)
    randomize_b(model)
    model.save_pretrained(tmp_path)
    lora = cat_rs.load_lora(tmp_path)
    assert list(lora.state) == ["unet"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in lora.state["unet"]} == set(saved)
    assert all(torch.equal(tensor, saved[f"base_model.model.{name}"]) for name, tensor in lora.state["unet"].items())
    unet = tiny_unet()
    lora.load_into(unet)
    assert_same_output(unet, model)
    again = get_peft_model(tiny_unet(), LoraConfig(target_modules=["to_k"]), adapter_name="other")
    cat_rs.load_lora(tmp_path, model=again)
    assert_same_output(again, model)
    file = cat_rs.save_lora(tmp_path / "diffusers.safetensors", lora)
    unet = tiny_unet()
    unet.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="unet")
    assert_same_output(unet, model)


def test_diffusers_own_single_model_file_comes_back(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet(), lora_alpha=2)
    unet.save_lora_adapter(tmp_path)
    other = tiny_unet()
    cat_rs.load_lora(tmp_path, model=other)
    assert_same_output(other, unet)
    assert_same_state(other, unet)


def assert_same_output(left: Any, right: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    prompt = torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        expected = right(latents, 7, prompt).sample
        torch.testing.assert_close(left(latents, 7, prompt).sample, expected, atol=1e-5, rtol=1e-5)


# ---- kohya


def kohya_state(*, alpha: float | None = 2.0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A file as kohya's documentation describes it."""
    layers = {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": ((4, 16), (16, 4)),
        "lora_unet_down_blocks_1_attentions_0_proj_in": ((4, 16, 1, 1), (16, 4, 1, 1)),
        "lora_unet_mid_block_resnets_0_conv1": ((2, 16, 3, 3), (16, 2, 1, 1)),
    }
    state = {}
    for name, (down, up) in layers.items():
        state[f"{name}.lora_down.weight"] = torch.randn(down, dtype=dtype)
        state[f"{name}.lora_up.weight"] = torch.randn(up, dtype=dtype)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_hand_made_kohya_file_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    state = kohya_state(dtype=dtype)
    save_file(
        state,
        tmp_path / "a.safetensors",
        {"ss_base_model_version": "sd_v1", "ss_note": "kept", "sshs_model_hash": "1"},
    )
    lora = cat_rs.load_lora(tmp_path / "a.safetensors")
    assert (lora.format, lora.family, lora.metadata) == ("kohya", "sd", {})
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    name = "lora_unet_" + layer.replace(".", "_")
    assert torch.equal(lora.state["unet"][f"{layer}.lora_A.weight"], state[f"{name}.lora_down.weight"])
    assert torch.equal(lora.state["unet"][f"{layer}.lora_B.weight"], state[f"{name}.lora_up.weight"])
    assert lora.alphas["unet"][layer] == 2.0
    assert "ss_note" in repr(lora.file_metadata)
    again = cat_rs.save_lora(tmp_path / "b.safetensors", lora, format="kohya")
    written = load_file(again)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], tensor.to(written[name].dtype)) for name, tensor in state.items())
    assert {written[name].dtype for name in state if "lora_" in name.split(".")[1]} == {dtype}
    with safe_open(again, "pt") as file:
        assert file.metadata()["ss_note"] == "kept"
        assert "sshs_model_hash" not in file.metadata()
    unet = tiny_unet()
    lora.load_into(unet)
    scales = {name: module.scaling["default"] for name, module in unet.named_modules() if hasattr(module, "scaling")}
    assert scales[layer] == 0.5
    assert scales["mid_block.resnets.0.conv1"] == 1.0


def test_kohya_file_without_alpha_has_scale_one(tmp_path: Path) -> None:
    save_file(kohya_state(alpha=None), tmp_path / "a.safetensors")
    lora = cat_rs.load_lora(tmp_path / "a.safetensors")
    assert sorted(lora.alphas["unet"].values()) == [2.0, 4.0, 4.0]


def test_kohya_fields(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet())
    facts = {"base_model": "stable-diffusion-v1-5", "trigger": {"sks": "cat"}, "cat_factor": 1.0, "steps": 40}
    file = cat_rs.save_lora(tmp_path / "my_cat.safetensors", unet, format="kohya", metadata=facts)
    with safe_open(file, "pt") as opened:
        fields = opened.metadata()
    assert {name: fields[name] for name in fields if name.startswith("ss_")} == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "8",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_output_name": "my_cat",
        "ss_sd_model_name": "stable-diffusion-v1-5",
        "ss_steps": "40",
        "ss_tag_frequency": json.dumps({"my_cat": {"sks": 1}}),
    }
    assert cat_rs.load_lora(file).metadata == facts == read_metadata(file)


def test_rslora_is_folded_into_kohyas_alpha(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet(), use_rslora=True)
    file = cat_rs.save_lora(tmp_path / "a.safetensors", unet, format="kohya")
    other = tiny_unet()
    cat_rs.load_lora(file, model=other)
    assert_same_output(other, unet)
    assert {round(float(tensor), 4) for name, tensor in load_file(file).items() if name.endswith("alpha")} == {16.0}


def test_what_kohya_cannot_hold_is_refused(tmp_path: Path) -> None:
    def message(unet: Any, **options: Any) -> str:
        with pytest.raises(AdapterError) as caught:
            cat_rs.save_lora(tmp_path / "a.safetensors", unet, format="kohya", **options)
        return str(caught.value)

    assert "no place for DoRA" in message(add_lora(tiny_unet(), use_dora=True))
    assert "no place for a bias of lora_B" in message(add_lora(tiny_unet(), lora_bias=True, target_modules=["conv1"]))
    assert "layers_per_block 2, got 1" in message(add_lora(tiny_unet()), family="sdxl")
    assert "no names for these layers of family flux" in message(add_lora(tiny_unet()), family="flux")
    assert not list(tmp_path.iterdir())


def test_family_must_be_known_for_kohya(tmp_path: Path) -> None:
    state = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    with pytest.raises(InvalidValueError, match="`family` must be sd, sdxl or flux"):
        cat_rs.save_lora(tmp_path / "a.safetensors", state, format="kohya")
    file = cat_rs.save_lora(tmp_path / "a.safetensors", state, format="kohya", family="sd")
    assert "lora_unet_conv_in.alpha" in load_file(file)


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


def test_ambiguous_names_are_refused(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid_block = torch.nn.ModuleDict({"a_b": torch.nn.Linear(2, 2)})
            self.mid_block_a = torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)})

    save_file(
        {
            "lora_unet_mid_block_a_b.lora_down.weight": torch.ones(1, 2),
            "lora_unet_mid_block_a_b.lora_up.weight": torch.ones(2, 1),
        },
        tmp_path / "a.safetensors",
    )
    with pytest.raises(AdapterError, match="names that fit several layers of the model: `lora_unet_mid_block_a_b`"):
        cat_rs.load_lora(tmp_path / "a.safetensors", model=Odd())
    with pytest.raises(AdapterError, match="unknown names: `lora_unet_mid_block_a_b`"):
        cat_rs.load_lora(tmp_path / "a.safetensors")


# ---- models


def test_adapter_of_the_same_shape_is_filled(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet(), seed=2)
    file = cat_rs.save_lora(tmp_path, unet)
    assert file.name == "pytorch_lora_weights.safetensors"
    other = add_lora(tiny_unet(), seed=3)
    cat_rs.load_lora(tmp_path, model=other)
    assert_same_state(other, unet)
    with pytest.raises(AdapterError, match="must have the layers, ranks and scales of the file, got others at"):
        cat_rs.load_lora(tmp_path, model=add_lora(tiny_unet(), r=2))


def test_what_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    cat_rs.save_lora(tmp_path, add_lora(tiny_unet()))
    other = tiny_unet(cross_attention_dim=24)
    with pytest.raises(AdapterError, match=r"attn2.to_k has weight \[16, 24\], which A \[4, 16\]"):
        cat_rs.load_lora(tmp_path, model=other)
    small = tiny_unet(down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
    with pytest.raises(AdapterError, match=r"does not have down_blocks\.1\.attentions\.0"):
        cat_rs.load_lora(tmp_path, model=small)
    with pytest.raises(AdapterError, match="expected layers of text_encoder, got only unet"):
        cat_rs.load_lora(tmp_path, text_encoder=clip())
    assert not state_of(other)
    assert not state_of(small)


def test_layers_that_end_alike_get_no_adapter(tmp_path: Path) -> None:
    transformer = add_lora(flux_transformer(), target_modules=r"proj_out")
    assert len(state_of(transformer)) == 2
    file = cat_rs.save_lora(tmp_path, transformer)
    other = flux_transformer()
    cat_rs.load_lora(file, model=other)
    assert_same_state(other, transformer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_compiled_and_parallel_models_are_unwrapped(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet())
    expected = load_file(cat_rs.save_lora(tmp_path, unet))
    for number, wrapped in enumerate([torch.compile(unet), torch.nn.DataParallel(unet)]):
        file = cat_rs.save_lora(tmp_path / str(number), wrapped)
        assert load_file(file).keys() == expected.keys()
    other = tiny_unet()
    cat_rs.load_lora(tmp_path, model=torch.compile(other))
    assert_same_state(other, unet)


def test_a_text_encoder_alone(tmp_path: Path) -> None:
    encoder = clip()
    add_text_lora(encoder, seed=5, r=2)
    file = cat_rs.save_lora(tmp_path, encoder)
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in load_file(file))
    other = clip()
    cat_rs.load_lora(file).load_into(other)
    assert_same_state(other, encoder)


def test_dtype_and_adapter_name(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet())
    file = cat_rs.save_lora(tmp_path, unet, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    with pytest.raises(AdapterError, match="`adapter_name` must be an adapter of the unet, got 'x': it has 'default'"):
        cat_rs.save_lora(tmp_path, unet, adapter_name="x")
    with pytest.raises(AdapterError, match="it has none"):
        cat_rs.save_lora(tmp_path, tiny_unet())
    other = tiny_unet()
    cat_rs.load_lora(file, model=other, adapter_name="x")
    assert list(other.peft_config) == ["x"]


def test_more_than_lora_is_refused(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet(), modules_to_save=["conv_in"])
    with pytest.raises(AdapterError, match="got unknown names: `conv_in"):
        cat_rs.save_lora(tmp_path, unet)


# ---- files


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


def test_an_old_file_stays_when_writing_fails(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet())
    file = cat_rs.save_lora(tmp_path, unet)
    before = file.read_bytes()
    (tmp_path / f".unfinished-{file.name}").mkdir()
    with pytest.raises(IsADirectoryError):
        cat_rs.save_lora(tmp_path, unet, dtype=torch.float16)
    assert file.read_bytes() == before


def test_an_old_file_stays_when_the_disk_is_full(tmp_path: Path) -> None:
    file = cat_rs.save_lora(tmp_path, add_lora(tiny_unet()))
    before = file.read_bytes()
    script = """
import resource, sys, torch
import cat_rs
state = {"unet.conv_in.lora_A.weight": torch.ones(64, 64), "unet.conv_in.lora_B.weight": torch.ones(64, 64)}
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    cat_rs.save_lora(sys.argv[1], state)
except OSError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert str(file) in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_changed_bytes_never_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(kohya_state(), path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        changed = bytearray(whole[: generator.integers(len(whole))] if generator.random() < 0.2 else whole)
        for place in generator.integers(min(len(changed), 900) or 1, size=generator.integers(1, 4)):
            changed[place : place + 1] = bytes([generator.integers(256)])
        path.write_bytes(changed)
        try:
            cat_rs.load_lora(path)
        except AdapterError as error:
            errors.append(str(error))
    assert len(errors) > 200
    assert not [error for error in errors if "panicked" in error]


def test_trouble_with_files_has_its_own_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        cat_rs.load_lora(tmp_path / "absent.safetensors")
    assert caught.value.filename == str(tmp_path / "absent.safetensors")
    assert caught.value.errno == 2
    with pytest.raises(FileNotFoundError):
        cat_rs.load_lora(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises((NotADirectoryError, FileExistsError)):
        cat_rs.save_lora(tmp_path / "file" / "a.safetensors", kohya_state(), format="kohya", family="sd")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"\xff" * 8, "its header would have 18446744073709551615 bytes"),
        (b"\x02" + b"\0" * 7 + b"[]", "its header is not valid"),
        (b"PK\x03\x04" + b"\0" * 100, "its header would have"),
    ],
    ids=["empty", "huge", "list", "zip"],
)
def test_broken_files_are_adapter_errors(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=message) as caught:
        cat_rs.load_lora(path)
    assert str(path) in str(caught.value)


def test_content_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(AdapterError, match=r"a\.safetensors: load_lora: expected .* unknown names: `x`"):
        cat_rs.load_lora(path)
    save_file(kohya_state(), path, {"cat_rs": "{"})
    with pytest.raises(AdapterError, match=r"a\.safetensors: expected JSON in cat_rs"):
        cat_rs.load_lora(path)
    shutil.copy(path, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterError, match="expected peft_type LORA, got 'IA3'"):
        cat_rs.load_lora(tmp_path)


def test_arguments_are_checked(tmp_path: Path) -> None:
    state = kohya_state()
    for options, message in [
        ({"format": "a1111"}, "`format` must be diffusers, peft, kohya, got 'a1111'"),
        ({"family": "sd4"}, "`family` must be sd, sdxl, flux, got 'sd4'"),
        ({"format": "peft"}, "`path` must be a folder"),
        ({"dtype": torch.int8}, "`dtype` must be a floating dtype"),
        ({"metadata": {"x": object()}}, "`metadata` must be JSON"),
    ]:
        with pytest.raises(InvalidValueError, match=message):
            cat_rs.save_lora(tmp_path / "a.safetensors", state, **options)
    with pytest.raises(InvalidValueError, match=r"must end with \.safetensors"):
        cat_rs.save_lora(tmp_path / "a", state, format="kohya")
    with pytest.raises(AdapterError, match="got none"):
        cat_rs.save_lora(tmp_path / "a", {})
    assert not os.listdir(tmp_path)


# ---- command line


def test_convert_looks_layers_up_in_the_model(
    tiny_pipeline_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(kohya_state(), tmp_path / "a.safetensors")
    arguments = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "diffusers"]
    assert main([*arguments, "--model", str(tiny_pipeline_dir), "--dtype", "float32"]) == 0
    assert "3 layers of unet, from kohya to diffusers" in capsys.readouterr().out
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {torch.float32}
    state = {name.replace("mid_block_resnets_0", "mid_block_resnets_7"): each for name, each in kohya_state().items()}
    save_file(state, tmp_path / "a.safetensors")
    assert main([*arguments, "--model", str(tiny_pipeline_dir)]) == 2
    assert "unknown names: `lora_unet_mid_block_resnets_7_conv1`" in capsys.readouterr().err


def test_convert_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "a"]) == 2
    assert capsys.readouterr().err == "cat-rs: cat-rs convert: missing OUTPUT, --to\n"


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_the_same_adapter_gives_the_same_bytes(format: str, tmp_path: Path) -> None:
    model = add_lora(tiny_unet())
    randomize_b(model)
    facts = {"base_model": "tiny", "trigger": {"sks": "cat"}, "steps": 3, "lr": 1e-4, "rank": 4}
    file = tmp_path / "adapter.safetensors"

    def written() -> bytes:
        cat_rs.save_lora(file, model, format=format, family="sd", metadata=facts)
        return file.read_bytes()

    first = written()
    assert all(written() == first for _ in range(5))
    length = int.from_bytes(first[:8], "little")
    assert length % 8 == 0
    with safe_open(file, "pt") as opened:
        assert list(opened.keys())
