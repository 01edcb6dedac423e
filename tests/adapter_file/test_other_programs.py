"""Files of other programs that diffusers reads: each is read as diffusers does, or refused with advice that works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cat_rs
from cat_rs.errors import AdapterError

from .models import flux_transformer, state_of
from .test_flux import flux_pipeline, run_flux

WIDTH = 8


def pair(
    name: str, inputs: int = WIDTH, outputs: int = WIDTH, words: str = "lora_A lora_B"
) -> dict[str, torch.Tensor]:
    """A and B of one layer."""
    down, up = words.split()
    return {f"{name}.{down}.weight": torch.randn(2, inputs), f"{name}.{up}.weight": torch.randn(outputs, 2)}


KOHYA_WORDS = "lora_down lora_up"


def read(tensors: dict[str, torch.Tensor], folder: Path, **models: Any) -> cat_rs.LoraFile:
    save_file(tensors, folder / "a.safetensors")
    return cat_rs.load_lora(folder / "a.safetensors", **models)


def products(state: dict[str, torch.Tensor], scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """Module -> scale * B A, of PEFT's names."""
    modules = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    return {
        module: scales.get(module, 1.0) * state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
        for module in modules
    }


def of_diffusers(mixin: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Component and module -> scale * B A, as diffusers reads the file."""
    converted = mixin.lora_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    alphas = {name.removesuffix(".alpha"): converted.pop(name) for name in [*converted] if name.endswith(".alpha")}
    scales = {name: float(alpha) / converted[f"{name}.lora_A.weight"].shape[0] for name, alpha in alphas.items()}
    return products(converted, scales)


def of_cat_rs(lora: cat_rs.LoraFile) -> dict[str, torch.Tensor]:
    """The same, as load_lora read it."""
    found = {}
    for component, state in lora.state.items():
        scales = {m: alpha / state[f"{m}.lora_A.weight"].shape[0] for m, alpha in lora.alphas[component].items()}
        found |= {f"{component}.{module}": product for module, product in products(state, scales).items()}
    return found


def dotted() -> dict[str, torch.Tensor]:
    block = "transformer.transformer_blocks.0.attn.to_q"
    return {**pair(block, words=KOHYA_WORDS), f"{block}.alpha": torch.tensor(4.0)}


def comfy(*modules: str) -> dict[str, torch.Tensor]:
    return {name: tensor for module in modules for name, tensor in pair(f"diffusion_model.{module}").items()}


def comfy_flux() -> dict[str, torch.Tensor]:
    tensors = pair("diffusion_model.double_blocks.0.img_attn.qkv", WIDTH, 3 * WIDTH, KOHYA_WORDS)
    tensors |= pair("diffusion_model.double_blocks.0.img_attn.proj", words=KOHYA_WORDS)
    return {**tensors, "diffusion_model.double_blocks.0.img_attn.proj.alpha": torch.tensor(1.0)}


def paths_with_underscores() -> dict[str, torch.Tensor]:
    names = ("lora_transformer_transformer_blocks_0_attn_to_q", "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= {**pair(name, words=KOHYA_WORDS), f"{name}.alpha": torch.tensor(4.0)}
    return tensors


# Which of diffusers' pipelines reads it, and the tensors.
FILES = {
    "dotted kohya": ("FluxLoraLoaderMixin", dotted()),
    "comfy z-image": ("ZImageLoraLoaderMixin", comfy("layers.0.attention.to_q", "layers.0.feed_forward.w1")),
    "comfy ltx": ("LTXVideoLoraLoaderMixin", comfy("transformer_blocks.0.attn1.to_q", "proj_in")),
    "comfy hidream": ("HiDreamImageLoraLoaderMixin", comfy("double_stream_blocks.0.block.attn1.to_q")),
    "comfy qwen": (
        "QwenImageLoraLoaderMixin",
        comfy("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"),
    ),
    "comfy flux": ("FluxLoraLoaderMixin", comfy_flux()),
    "paths with underscores": ("FluxLoraLoaderMixin", paths_with_underscores()),
    "adapter name": (
        "QwenImageLoraLoaderMixin",
        pair("diffusion_model.transformer_blocks.0.attn.to_q", words="lora_A.default lora_B.default"),
    ),
    "second transformer": ("WanLoraLoaderMixin", pair("transformer_2.blocks.0.attn1.to_q")),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_read_as_diffusers_reads_them(case: str, tmp_path: Path) -> None:
    from diffusers import loaders

    name, tensors = FILES[case]
    if not hasattr(loaders, name):
        pytest.skip(f"this version of diffusers has no {name}")
    expected, got = of_diffusers(getattr(loaders, name), tensors), of_cat_rs(read(tensors, tmp_path))
    assert got.keys() == expected.keys()
    for layer, product in expected.items():
        torch.testing.assert_close(got[layer], product, atol=1e-5, rtol=1e-5)


def test_every_component_comes_back(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    components = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
    for component in components:
        layer = "encoder.block.0.layer.0.SelfAttention.q" if component.startswith("text") else "blocks.0.attn1.to_q"
        tensors |= pair(f"{component}.{layer}")
    lora = read(tensors, tmp_path)
    assert set(lora.state) == {*components}
    for format, path in (("diffusers", tmp_path / "b.safetensors"), ("peft", tmp_path / "peft")):
        again = cat_rs.load_lora(cat_rs.save_lora(path, lora, format=format))
        assert {c: {*state} for c, state in again.state.items()} == {c: {*state} for c, state in lora.state.items()}


def test_kinds_of_names_may_be_mixed(tmp_path: Path) -> None:
    transformer = flux_transformer()
    block = "single_transformer_blocks.0"
    width = transformer.single_transformer_blocks[0].attn.to_q.weight.shape[1]
    tensors = {
        **pair(f"transformer.{block}.attn.to_q", width, width),
        **pair("lora_unet_double_blocks_0_img_attn_proj", width, width),
    }
    # Two kinds of names for one layer: diffusers, too, takes the path.
    tensors |= pair("lora_transformer_single_transformer_blocks_0_attn_to_q", width, width)
    lora = read(tensors, tmp_path, model=transformer)
    assert set(lora.alphas["transformer"]) == {f"{block}.attn.to_q", "transformer_blocks.0.attn.to_out.0"}
    assert torch.equal(
        lora.state["transformer"][f"{block}.attn.to_q.lora_A.weight"],
        tensors[f"transformer.{block}.attn.to_q.lora_A.weight"],
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("diffusion_model.blocks.0.self_attn.q", KOHYA_WORDS),
        ("diffusion_model.layers.0.attention.qkv", "lora_A lora_B"),
        ("lora_unet_blocks_0_self_attn_q", KOHYA_WORDS),
        ("lora_unet_final_layer_adaLN_modulation_1", KOHYA_WORDS),
        ("double_blocks.0.processor.qkv_lora1", "down up"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", "hada_w1_a hada_w1_b"),
    ],
)
def test_what_only_diffusers_has_tables_for_is_refused_with_advice(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"a\.safetensors: .*what diffusers reads, pipe\.load_lora_weights\(file"):
        read(pair(name, words=words), tmp_path)


def test_the_advice_works(tmp_path: Path) -> None:
    transformer = flux_transformer()
    width = transformer.x_embedder.weight.shape[0]
    tensors = pair("diffusion_model.double_blocks.0.img_attn.proj", width, width, KOHYA_WORDS)
    # diffusers leaves these out.
    tensors |= pair("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", words=KOHYA_WORDS)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"t5xxl.*; what diffusers reads"):
        cat_rs.load_lora(tmp_path / "a.safetensors")
    pipe = flux_pipeline(transformer)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="other")
    file = cat_rs.save_lora(tmp_path / "b.safetensors", pipe.transformer, adapter_name="other")
    again = flux_transformer()
    base = run_flux(again)
    cat_rs.load_lora(file, model=again)
    torch.testing.assert_close(run_flux(again), run_flux(pipe.transformer))
    assert (run_flux(again) - base).abs().max() > 1e-3
    assert any("attn.to_out.0" in layer for layer in state_of(again))


def test_names_without_a_component_belong_to_the_given_model(tmp_path: Path) -> None:
    transformer = flux_transformer()
    width = transformer.x_embedder.weight.shape
    layer = {**pair("x_embedder", width[1], width[0], KOHYA_WORDS), "x_embedder.alpha": torch.tensor(1.0)}
    with pytest.raises(
        AdapterError, match=r"give load_lora the model, or put adapter_model\.safetensors and adapter_config"
    ):
        read(layer, tmp_path)
    assert read(layer, tmp_path, model=transformer).alphas == {"transformer": {"x_embedder": 1.0}}


def test_peft_tensors_without_their_config_are_refused_with_advice(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(pair("base_model.model.x_embedder"), folder / "adapter_model.safetensors")
    for path in (folder, folder / "adapter_model.safetensors", tmp_path):
        with pytest.raises(
            AdapterError, match=r"expected adapter_config\.json beside adapter_model\.safetensors|give load_lora"
        ):
            cat_rs.load_lora(path)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": 4}), encoding="utf-8-sig"
    )
    assert cat_rs.load_lora(folder).alphas == {"transformer": {"x_embedder": 4}}


def test_a_file_named_as_peft_names_it_may_hold_names_of_diffusers(tmp_path: Path) -> None:
    save_file(dotted(), tmp_path / "adapter_model.safetensors")
    assert cat_rs.load_lora(tmp_path).alphas == {"transformer": {"transformer_blocks.0.attn.to_q": 4.0}}
