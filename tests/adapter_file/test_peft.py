"""PEFT's folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cat_rs
from tests.models import add_lora, randomize_b, tiny_unet

from .models import UNET_LAYERS, assert_same_output, assert_same_state


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    from peft import PeftModel

    unet = add_lora(tiny_unet(), target_modules=UNET_LAYERS, rank_pattern={"to_q": 3}, use_rslora=True)
    folder = cat_rs.save_lora(tmp_path / "peft", unet, format="peft", metadata={"trigger": "sks"})
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(tiny_unet(), folder)
    assert_same_output(loaded, unet)
    assert cat_rs.load_lora(folder).metadata == {"trigger": "sks"}


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


def test_a_folder_named_for_a_component_says_whose_layers_a_file_without_a_config_holds(tmp_path: Path) -> None:
    names = [f"text_model.encoder.layers.0.self_attn.{each}_proj.lora_" for each in "qv"]
    state = {f"{name}{side}.weight": torch.ones(2, 2) for name in names for side in "AB"}
    (tmp_path / "text_encoder_2").mkdir()
    config = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 4})}
    save_file(state, tmp_path / "text_encoder_2" / "adapter_model.safetensors", config)
    assert list(cat_rs.load_lora(tmp_path).state) == ["text_encoder_2"]
