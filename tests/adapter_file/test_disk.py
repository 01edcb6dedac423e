"""Files that are missing, damaged or cannot be written, and arguments out of their domain."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cat_rs
from cat_rs.errors import AdapterError, InvalidValueError
from tests.models import add_lora, tiny_unet

from .models import kohya_state


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
    (tmp_path / "notes").write_text("mine")
    for format in ("diffusers", "peft"):
        with pytest.raises(InvalidValueError, match=r"or be a folder, got the file .*notes"):
            cat_rs.save_lora(tmp_path / "notes", state, format=format)
    assert (tmp_path / "notes").read_text() == "mine"


def test_half_of_a_surrogate_pair_is_no_path(tmp_path: Path) -> None:
    from cat_rs._native import _core

    path = tmp_path / "half \ud800.safetensors"
    with pytest.raises(InvalidValueError, match=r"save_lora: `path` must be a path, got '.*\\ud800"):
        cat_rs.save_lora(path, kohya_state(), format="kohya", family="sd")
    with pytest.raises(InvalidValueError, match="load_lora: `path` must be a path"):
        cat_rs.load_lora(path)
    with pytest.raises(TypeError, match="'path': must be a path that the file system can encode"):
        _core.read_safetensors(path)
    with open(tmp_path / "a", "wb") as file, pytest.raises(TypeError, match="'path': must be a path"):
        _core.write_safetensors(file.fileno(), path, [], {})
    with pytest.raises(TypeError):
        _core.read_safetensors(3)  # type: ignore[arg-type]
