"""Files of kohya's trainers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cat_rs
from cat_rs.adapter_file.model import check_ldm_layout
from cat_rs.errors import AdapterError, InvalidValueError
from tests.models import add_lora, tiny_unet

from .models import assert_same_output, kohya_state


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
    training = {"base_model": "stable-diffusion-v1-5", "trigger": {"sks": "cat"}, "cat_factor": 1.0, "steps": 40}
    file = cat_rs.save_lora(tmp_path / "my_cat.safetensors", unet, format="kohya", metadata=training)
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
    assert cat_rs.load_lora(file).metadata == training


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


@pytest.mark.parametrize(("layers", "has_names"), [(2, True), ([2, 2, 2], True), ([2, 2, 1], False)], ids=str)
def test_sdxls_names_count_two_layers_a_block(layers: int | list[int], has_names: bool) -> None:
    unet = torch.nn.Module()
    unet.config = SimpleNamespace(layers_per_block=layers)
    with contextlib.nullcontext() if has_names else pytest.raises(AdapterError, match="layers_per_block 2, got"):
        check_ldm_layout(unet)


def test_family_must_be_known_for_kohya(tmp_path: Path) -> None:
    state = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    with pytest.raises(InvalidValueError, match="`family` must be sd, sdxl or flux"):
        cat_rs.save_lora(tmp_path / "a.safetensors", state, format="kohya")
    file = cat_rs.save_lora(tmp_path / "a.safetensors", state, format="kohya", family="sd")
    assert "lora_unet_conv_in.alpha" in load_file(file)


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
