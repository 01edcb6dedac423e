"""Models of the hub where there is no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cat_rs.evaluation import EvaluationFileError, load_encoder
from cat_rs.training import TrainingError
from cat_rs.training.model import load_pipeline

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hub is asked, and whether the loaders may ask it themselves; nothing leaves this process."""
    asked: list[Any] = []

    def no_network(_self: Any, model: str, timeout: float) -> None:
        asked.append(model)
        raise ConnectionError("Name or service not known\nmore")

    def load(model: str, *, local_files_only: bool, **_more: Any) -> None:
        asked.append(local_files_only)
        raise OSError("the file does not exist")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", load)
    return asked


def test_a_model_that_the_hub_cannot_give_is_told_with_the_reason(asked: list[Any]) -> None:
    reason = "no such folder, and the hub does not give it: Name or service not known$"
    with pytest.raises(TrainingError, match=f"cannot load a/b: {reason}"):
        load_pipeline("a/b", torch.float32, torch.device("cpu"))
    with pytest.raises(EvaluationFileError, match=f"encoder: expected a CLIP.*, got c/d: {reason}"):
        load_encoder("c/d")
    assert asked == ["a/b", True, "c/d", True]


def test_a_folder_is_not_looked_for_on_the_hub(asked: list[Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the file does not exist"):
        load_pipeline(str(tmp_path), torch.float32, torch.device("cpu"))
    assert asked == [False]


def test_a_name_that_the_hub_cannot_have_is_refused_without_a_request() -> None:
    with pytest.raises(TrainingError, match="a/b/c: no such folder, and the hub does not give it: Repo id"):
        load_pipeline("a/b/c", torch.float32, torch.device("cpu"))
