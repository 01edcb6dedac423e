"""`cat-rs convert`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cat_rs
from cat_rs.cli import main
from tests.models import add_lora, tiny_unet

from .models import kohya_state


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
    assert main([*arguments, "--model", str(tiny_pipeline_dir), "--overwrite"]) == 2
    assert "unknown names: `lora_unet_mid_block_resnets_7_conv1`" in capsys.readouterr().err


def test_the_file_tells_kohyas_family(
    tiny_pipeline_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers as narrow as the small model's do not."""
    file = cat_rs.save_lora(tmp_path / "mine.safetensors", add_lora(tiny_unet()))
    assert main(["convert", str(file), str(tmp_path / "web.safetensors"), "--to", "kohya"]) == 0
    assert cat_rs.load_lora(tmp_path / "web.safetensors").file_metadata["ss_base_model_version"] == "sd_v1"
    peft = cat_rs.save_lora(tmp_path / "peft", cat_rs.load_lora(file), format="peft")
    assert cat_rs.load_lora(peft).family == "sd"

    foreign = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    save_file(foreign, tmp_path / "foreign.safetensors")
    arguments = ["convert", str(tmp_path / "foreign.safetensors"), str(tmp_path / "b.safetensors"), "--to", "kohya"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "family: expected --family sd, sdxl or flux with --to kohya" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()
    assert main([*arguments, "--family", "sd"]) == 0
    assert main([*arguments, "--model", str(tiny_pipeline_dir), "--overwrite"]) == 0


def test_convert_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "a"]) == 2
    assert capsys.readouterr().err == "cat-rs: cat-rs convert: missing OUTPUT, --to\n"
