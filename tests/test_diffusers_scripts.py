"""docs/diffusers-scripts.md: its changes apply to diffusers' real training scripts, and the first one trains.

The scripts are fetched at test time; CAT_RS_DIFFUSERS names a checkout of diffusers to take them from instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import load_file
from scripts import diffusers_scripts

from tests.test_docs import FENCED

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "v0.40.0"
SCRIPTS = {
    "train_dreambooth_lora.py": "dreambooth",
    "train_text_to_image_lora.py": "text_to_image",
    "train_dreambooth_lora_sdxl.py": "dreambooth",
    "train_dreambooth_lora_flux.py": "dreambooth",
}


def real_script(name: str) -> str:
    """The script as diffusers has it; skips the test where it cannot be had."""
    path = f"examples/{SCRIPTS[name]}/{name}"
    checkout = os.environ.get("CAT_RS_DIFFUSERS")
    if checkout is not None:
        return Path(checkout, path).read_text(encoding="utf-8")
    try:
        url = f"https://raw.githubusercontent.com/huggingface/diffusers/{RELEASE}/{path}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()
    except OSError as error:
        pytest.skip(f"{name} of diffusers {RELEASE} cannot be fetched: {error}")


def changed_script(name: str) -> tuple[str, tuple[int, int]]:
    text, *counts = diffusers_scripts.applied(diffusers_scripts.changes()[name], real_script(name))
    return text, (counts[0], counts[1])


def test_the_page_has_every_script_and_names_the_release() -> None:
    text = diffusers_scripts.PAGE.read_text(encoding="utf-8")
    assert diffusers_scripts.changes().keys() == diffusers_scripts.line_counts().keys() == SCRIPTS.keys()
    assert f"diffusers/tree/{RELEASE}/examples" in text
    blocks = [code for language, code in FENCED.findall(text) if language == "diff"]
    assert blocks == list(diffusers_scripts.changes().values())
    for change in blocks:
        # Trackers refuse lists, and `step` is the scripts' own.
        assert "nargs" not in change
        assert {"cat_step", "--trigger_word", "--class_word"} <= set(change.replace('"', " ").split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_changes_apply_to_the_real_script(name: str) -> None:
    text, counts = changed_script(name)
    compile(text, name, "exec")
    assert counts == diffusers_scripts.line_counts()[name]


def test_the_changed_dreambooth_script_trains(tmp_path: Path) -> None:
    name = "train_dreambooth_lora.py"
    (tmp_path / name).write_text(changed_script(name)[0], encoding="utf-8")
    pytest.importorskip("torchvision", reason="diffusers' script needs torchvision")
    (tmp_path / "pictures").mkdir()
    for picture in (ROOT / "examples/emoji_model/concepts/pineapple").glob("*.png"):
        shutil.copy(picture, tmp_path / "pictures")
    places = {
        "--pretrained_model_name_or_path": ROOT / "examples/emoji_model/model",
        "--instance_data_dir": tmp_path / "pictures",
        "--output_dir": tmp_path / "out",
    }
    words = ("--instance_prompt", "a sks fruit", "--trigger_word", "sks", "--class_word", "fruit")
    options = ("--resolution", "32", "--train_batch_size", "2", "--max_train_steps", "2", "--rank", "2", "--seed", "0")
    arguments = [str(text) for pair in places.items() for text in pair]
    done = subprocess.run(
        [sys.executable, str(tmp_path / name), *arguments, *words, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    adapter = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for key, tensor in adapter.items() if "lora_B" in key or "lora.up" in key)


SCRIPT = "a\nb\nc\nd\ne\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (" a\n+x\n", ("a\nx\nb\nc\nd\ne\n", 1, 0)),
        ("-b\n-...\n-d\n+x\n", ("a\nx\ne\n", 1, 3)),
        ("-b\n-...\n-d\n+x\n e\n@@\n-a\n", ("x\ne\n", 1, 4)),
    ],
)
def test_elided_lines_are_removed(change: str, expected: tuple[str, int, int]) -> None:
    assert diffusers_scripts.applied(change, SCRIPT) == expected


@pytest.mark.parametrize("change", ["-x\n", "-a\n-c\n", "-b\n-...\n-a\n"])
def test_a_change_without_a_place_is_an_error(change: str) -> None:
    with pytest.raises(ValueError, match="expected one place in the script for this change, found 0"):
        diffusers_scripts.applied(change, SCRIPT)


def test_a_change_with_two_places_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 2"):
        diffusers_scripts.applied("-a\n", SCRIPT * 2)
