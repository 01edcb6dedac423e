"""docs/diffusers-scripts.md: its changes apply to diffusers' real training scripts, and what comes out trains.

The scripts are fetched at test time; CAT_RS_DIFFUSERS names a checkout of diffusers to take them from instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import diffusers_scripts

from tests.test_docs import FENCED

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


@pytest.fixture(scope="module")
def tiny_flux_pipeline_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline with random weights, 16x16 pictures, in a folder."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer, models
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(0)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = special + [(letter, -1.0) for letter in "▁abcdefghijklmnopqrst"]
    # The script asks for 77 tokens, whatever the tokenizer says.
    words = CLIPTextConfig.from_pretrained(tiny_pipeline_dir / "text_encoder", max_position_embeddings=77)
    text_encoder = CLIPTextModel(words)
    vae = AutoencoderKL.from_pretrained(tiny_pipeline_dir / "vae")
    vae.register_to_config(shift_factor=0.0)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(tiny_pipeline_dir / "tokenizer"),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        tokenizer_2=T5TokenizerFast(tokenizer_object=Tokenizer(models.Unigram(vocabulary, unk_id=2)), extra_ids=0),
        transformer=FluxTransformer2DModel(
            in_channels=4 * vae.config.latent_channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=text_encoder.config.hidden_size,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        ),
    )
    folder = tmp_path_factory.mktemp("tiny") / "flux"
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "model", "options"),
    [
        ("train_dreambooth_lora.py", "tiny_pipeline_dir", ()),
        ("train_text_to_image_lora.py", "tiny_pipeline_dir", ("--caption_column", "text")),
        ("train_dreambooth_lora_sdxl.py", "tiny_sdxl_pipeline_dir", ()),
        ("train_dreambooth_lora_flux.py", "tiny_flux_pipeline_dir", ("--max_sequence_length", "16")),
    ],
)
def test_the_changed_script_trains(
    name: str, model: str, options: Sequence[str], concept_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / name).write_text(changed_script(name)[0], encoding="utf-8")
    for package in ("torchvision", "datasets"):
        pytest.importorskip(package, reason=f"diffusers' scripts need {package}")
    places = {"--pretrained_model_name_or_path": request.getfixturevalue(model), "--output_dir": tmp_path / "out"}
    words = ("--trigger_word", "sks", "--class_word", "cat")
    if "dreambooth" in name:
        (concept_dir / "metadata.jsonl").unlink()
        places["--instance_data_dir"] = concept_dir
        words += ("--instance_prompt", "a sks cat")
    else:
        places["--train_data_dir"] = concept_dir
    arguments = [str(text) for pair in places.items() for text in pair]
    few = ("--resolution", "16", "--train_batch_size", "2", "--max_train_steps", "2", "--rank", "2", "--seed", "0")
    done = subprocess.run(
        [sys.executable, str(tmp_path / name), *arguments, *words, *few, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "cache")},
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
