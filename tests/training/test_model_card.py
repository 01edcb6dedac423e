"""The model card of a run: what model hubs read of it, and what people do."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.utils import validate_repo_id

from cat_rs.evaluation import EvaluationResult
from cat_rs.evaluation.measures import format_interval
from cat_rs.training import CheckpointError, TrainConfig, train
from cat_rs.training.model_card import make_card
from tests.evaluation.conftest import tiny_clip_dir  # noqa: F401

Configure = Callable[..., TrainConfig]


@pytest.fixture
def configure(short_run: Configure) -> Configure:
    """Makes the settings of a short run; arguments override."""
    return functools.partial(short_run, steps=2, checkpoint_every=2)


@pytest.fixture
def evaluated(configure: Configure, tiny_clip_dir: Path, tmp_path: Path) -> Configure:  # noqa: F811
    """The same, with one evaluation at the end."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a sks cat on a red | background\na photo of a sks cat")
    settings = {
        "evaluate_every": 2,
        "evaluate_prompts": str(prompts),
        "evaluate_encoder": str(tiny_clip_dir),
        "evaluate_inference_steps": 2,
    }
    return lambda **more: configure(**settings | more)


def quiet(config: TrainConfig) -> Path:
    """Train without bars and news; returns the card's path."""
    train(config, progress=False, report=lambda _line: None)
    return Path(config.output_dir, "README.md")


def card_of(**settings: Any) -> ModelCard:
    """The card of a training that never ran."""
    defaults: dict[str, Any] = {"model": "org/model", "data": "pictures", "trigger": ("sks",), "class_word": "cat"}
    config = TrainConfig(**defaults | settings)
    return make_card(config, steps=20, pipeline="StableDiffusionPipeline", picture_count=5)


def test_hubs_read_the_metadata() -> None:
    card = ModelCard(str(card_of(trigger=("sks", "zwx=dog"))))
    assert card.data.to_dict() == {
        "base_model": "org/model",
        "instance_prompt": "sks, zwx",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [
            "text-to-image",
            "diffusers",
            "diffusers-training",
            "lora",
            "stable-diffusion",
            "template:sd-lora",
            "cat-rs",
        ],
    }
    validate_repo_id(card.data.base_model)


def test_no_trigger_no_trigger_words() -> None:
    card = card_of(trigger=(), class_word=None, cat_factor=0.0)
    assert "instance_prompt" not in card.data.to_dict()
    assert "Trigger" not in card.text
    assert "without a preservation term" in card.text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {},
            "by [Contrastive Adapter Training](https://arxiv.org/abs/2404.07554): in one of 4 steps, without the "
            "trigger the adapted model also had to predict what the base model predicts on pictures that the base "
            "model drew, so that it forgets less",
        ),
        ({"preserve": "captions"}, "in every step, without the trigger the adapted model also had to predict what "),
        ({"preserve": "captions"}, "what the base model predicts, so that it forgets less"),
        ({"preservation": "dco"}, "by [Direct Consistency Optimization](https://arxiv.org/abs/2402.12004)"),
        ({"preservation": "prior", "preserve": "set"}, "in every step, it also learned pictures that the base model"),
        ({"preservation": "l2"}, "with a penalty on the change of the weights in every step"),
        ({"preservation": "layers"}, "in each layer without the trigger in every step, so that it forgets less"),
    ],
    ids=["cat", "captions", "captions' end", "dco", "prior", "l2", "layers"],
)
def test_the_method_is_named(settings: dict[str, Any], text: str) -> None:
    assert text in card_of(**settings).text


def test_files_of_preservation_sets_are_named_without_their_folder() -> None:
    text = card_of(preserve="set", preserve_set=("/home/ann/general.safetensors",)).text
    assert "general.safetensors" in text
    assert "/home" not in text


def test_local_paths_are_nobody_elses_business(configure: Configure) -> None:
    config = configure()
    file = quiet(config)
    text = file.read_text()
    for path in (config.model, config.data, config.output_dir):
        assert path not in text
    card = ModelCard.load(file)
    # A hub would link the name of a folder to somebody's model.
    assert card.data.base_model is None
    assert f"`{Path(config.model).name}`" in card.text


def test_the_settings_are_a_config_file(configure: Configure, tmp_path: Path) -> None:
    config = configure(lr=3e-4, max_grad_norm=0.5)
    (block,) = re.findall(r"(?ms)^```yaml\n(.*?)^```$", quiet(config).read_text())
    (tmp_path / "again.yaml").write_text(f"model: {config.model}\ndata: {config.data}\n{block}")
    again = TrainConfig.load(tmp_path / "again.yaml")
    again = replace(again, output_dir=config.output_dir, checkpoint_every=2, tensorboard=False, device="cpu")
    assert again.effective() == config.effective()


def test_scores_and_pictures_of_the_last_evaluation(evaluated: Configure) -> None:
    config = evaluated(steps=4)
    file = quiet(config)
    card = ModelCard.load(file)
    result = EvaluationResult.load(file.parent / "evaluations" / "step-000004.json")
    scores = result.adapters["step 4"]
    for interval in (scores.ups, scores.tps, scores.kps, scores.identity, result.base.identity):
        assert interval is not None
        assert f"| {format_interval(interval)} |" in card.text
    shown = re.findall(r"!\[[^]]+\]\((\S+\.png)\)", card.text)
    widget = {entry["output"]["url"]: entry["text"] for entry in card.data.widget}
    # Two prompts of each kind, by the base model and by the adapter.
    assert len(shown) == len(set(shown)) == 8
    assert list(widget) == [path for path in shown if "/adapter/" in path]
    assert list(widget.values())[:2] == result.settings["prompts"]["trigger"]
    assert all((file.parent / path).read_bytes().startswith(b"\x89PNG") for path in shown)
    assert "a sks cat on a red \\| background" in card.text
    rows = (file.parent / shown[0]).with_name("metadata.jsonl").read_text().splitlines()
    assert [json.loads(row)["text"] for row in rows] == result.settings["prompts"]["trigger"]


def test_a_better_step_is_named(evaluated: Configure) -> None:
    config = evaluated(steps=4, evaluate_keep=0.0)
    file = quiet(config)
    front = json.loads((file.parent / "evaluations" / "front.json").read_text())
    best = [row["step"] for row in front["checkpoints"] if row["best"]]
    named = [int(step) for step in re.findall(r"`best/` holds the adapter of step (\d+)", file.read_text())]
    assert named == [step for step in best if step != 4]


def test_a_resumed_run_shows_the_pictures_that_are_there(evaluated: Configure) -> None:
    config = evaluated()
    before = quiet(config).read_bytes()
    assert quiet(replace(config, resume=True)).read_bytes() == before


def test_the_license_is_the_users(configure: Configure) -> None:
    config = configure()
    file = quiet(config)
    assert "license" not in metadata_load(file)
    card = ModelCard.load(file)
    card.data.license, card.data.license_name, card.data.license_link = "other", "mine", "LICENSE.md"
    card.save(file)
    quiet(replace(config, steps=4, resume=True))
    data = ModelCard.load(file).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "LICENSE.md")
    assert "steps: 4" in file.read_text()


@pytest.mark.parametrize("text", [b"# My project\n", b"---\ntags: [\n---\n", b"\xff\xfe"])
def test_a_readme_of_others_stays(configure: Configure, text: bytes) -> None:
    config = configure()
    file = Path(config.output_dir, "README.md")
    file.parent.mkdir()
    file.write_bytes(text)
    lines: list[str] = []
    train(config, progress=False, report=lines.append)
    assert file.read_bytes() == text
    assert any("README.md" in line and "stays" in line for line in lines)
    quiet(replace(config, overwrite=True))
    assert file.read_bytes() == text


def test_a_new_run_removes_the_card_of_the_old(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    file = quiet(config)
    monkeypatch.setattr("cat_rs.training.loop.Trainer", None)
    with pytest.raises(TypeError):
        quiet(replace(config, overwrite=True))
    assert not file.exists()


def test_a_card_that_cannot_be_written_is_an_error(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cat_rs.training.model_card.write_bytes", full)
    with pytest.raises(CheckpointError, match=r"README\.md"):
        quiet(configure())
