"""Files that are meant to hurt: an error that names them, at once and without much memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cat_rs
from cat_rs.errors import AdapterError

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
STATE = {f"{MODULE}.lora_A.weight": torch.ones(2, 4), f"{MODULE}.lora_B.weight": torch.ones(4, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}


def folder_with(
    folder: Path, config: Mapping[str, Any] | str, state: Mapping[str, torch.Tensor] = STATE, **metadata: str
) -> Path:
    """PEFT's folder of an adapter."""
    save_file(dict(state), folder / "adapter_model.safetensors", metadata)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    return folder


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", "(.|.)*x", ".*.*.*.*.*x"])
def test_no_pattern_takes_forever(pattern: str, tmp_path: Path) -> None:
    module = f"mid_block.{'a' * 5000}b"
    state = {name.replace(MODULE, module): tensor for name, tensor in STATE.items()}
    path = folder_with(tmp_path, CONFIG | {"alpha_pattern": {pattern: 1, "a+b": 4}}, state)
    assert cat_rs.load_lora(path).alphas["unet"] == {module: 4}


@pytest.mark.parametrize("pattern", ["(", "*", "(?P<a>", "((a{1000}){1000}){1000}", r"(a)\1", "(?=a)", "\ud800"])
def test_patterns_that_are_none_name_the_file(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"^{tmp_path}.*pattern.* must be a (regular expression|text)"):
        cat_rs.load_lora(folder_with(tmp_path, CONFIG | {"alpha_pattern": {pattern: 1}}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"peft_type": "LORA", "r": ' + "[" * 100_000, "expected JSON in the file"),
        ('{"peft_type": "LORA", "lora_alpha": ' + "1" * 5000 + "}", "expected JSON in the file"),
        ('{"peft_type": "LORA", "lora_alpha": 1, "lora_alpha": 2}', "it has 'lora_alpha' twice"),
        (CONFIG | {"lora_alpha": 10**400}, "lora_alpha of .* must be a finite number"),
        (CONFIG | {"lora_alpha": float("nan")}, "lora_alpha of .* must be a finite number"),
        (CONFIG | {"lora_alpha": "8"}, "lora_alpha of .* must be a finite number, got '8'"),
        (CONFIG | {"lora_dropout": "a"}, r"lora_dropout must be in \[0, 1\], got 'a'"),
        (CONFIG | {"use_rslora": []}, "use_rslora must be true or false, got"),
        (CONFIG | {"alpha_pattern": [1]}, "alpha_pattern must be an object"),
        (CONFIG | {"alpha_pattern": {"to_q": {}}}, "lora_alpha of .* must be a finite number"),
        ("\0", "expected a text in UTF-8"),
    ],
    ids=["deep", "digits", "twice", "huge", "nan", "text", "dropout", "rslora", "patterns", "pattern", "no-text"],
)
def test_wrong_settings_name_the_file(config: Mapping[str, Any] | str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"^{tmp_path}.*{message}"):
        cat_rs.load_lora(folder_with(tmp_path, config))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_only_files_are_read(name: str, kind: str, tmp_path: Path) -> None:
    path = folder_with(tmp_path, CONFIG) / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(AdapterError, match=f"^.*{path}.* (pipe or a device|has 0 bytes)"):
        cat_rs.load_lora(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_values_that_are_no_numbers_are_named(value: float, format: str, tmp_path: Path) -> None:
    name = f"{MODULE}.lora_B.weight"
    state = {**STATE, name: torch.tensor([[1.0, value]] * 4)}
    path = folder_with(tmp_path, CONFIG, state)
    if format == "diffusers":
        path = tmp_path / "a.safetensors"
        save_file({f"unet.{key}": tensor for key, tensor in state.items()}, path)
    with pytest.raises(AdapterError, match=f"^{path}.*`{name}` must have finite values, got NaN or infinity"):
        cat_rs.load_lora(path)


def test_no_infinity_is_written(tmp_path: Path) -> None:
    config = CONFIG | {"lora_alpha": 1e300}
    lora = cat_rs.load_lora(folder_with(tmp_path, config))
    with pytest.raises(AdapterError, match=r"to_q\.alpha` must be a finite number in float32, got 1"):
        cat_rs.save_lora(tmp_path / "a.safetensors", lora, format="kohya", family="sd")
    large = {f"unet.{name}": 1e6 * tensor for name, tensor in STATE.items()}
    with pytest.raises(AdapterError, match=r"save_lora: `.*A.weight` must have finite values, got .* torch.float16"):
        cat_rs.save_lora(tmp_path / "a.safetensors", large, dtype=torch.float16)
    assert not (tmp_path / "a.safetensors").exists()


def test_errors_of_tensors_to_save_say_so(tmp_path: Path) -> None:
    for value in (torch.ones(1, 4).to_sparse(), torch.ones(1), torch.ones(1, 4, dtype=torch.int64)):
        state = {"unet.mid_block.x.lora_A.weight": value, "unet.mid_block.x.lora_B.weight": torch.ones(4, 1)}
        with pytest.raises(AdapterError, match=r"^save_lora: `unet.mid_block.x.lora_A.weight` must"):
            cat_rs.save_lora(tmp_path / "a.safetensors", state)
