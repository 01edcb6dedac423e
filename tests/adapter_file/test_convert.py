"""`cat-rs convert`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cat_rs.cli import main

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
    assert main([*arguments, "--model", str(tiny_pipeline_dir)]) == 2
    assert "unknown names: `lora_unet_mid_block_resnets_7_conv1`" in capsys.readouterr().err


def test_convert_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "a"]) == 2
    assert capsys.readouterr().err == "cat-rs: cat-rs convert: missing OUTPUT, --to\n"
