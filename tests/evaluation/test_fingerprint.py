"""The fingerprint of a model sees all that decides what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cat_rs.evaluation import ClipEncoder
from cat_rs.evaluation.fingerprint import fingerprint, tensors_hash


class Model(torch.nn.Module):
    """A parameter, a buffer, and a buffer that no file keeps."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.config = {"width": width, "_name_or_path": "somewhere"}
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("table", torch.zeros(2, 3))
        self.register_buffer("passing", torch.zeros(2, 3), persistent=False)


def changed(name: str, tensor: torch.Tensor) -> Model:
    model = Model()
    setattr(model, name, torch.nn.Parameter(tensor) if name == "weight" else tensor)
    return model


@pytest.mark.parametrize("name", ["weight", "table", "passing"])
def test_values_dtypes_and_shapes_of_parameters_and_buffers_matter(name: str) -> None:
    tensors = [
        torch.zeros(2, 3),
        torch.eye(2, 3),
        # The same bytes, read in another way.
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.float16),
        torch.zeros(2, 3, dtype=torch.bfloat16),
    ]
    found = [fingerprint({"model": changed(name, tensor)}) for tensor in tensors]
    assert len(set(found)) == len(found)
    assert found[0] == fingerprint({"model": Model()})


def test_settings_matter_but_not_where_they_came_from() -> None:
    other = Model()
    other.config["_name_or_path"] = "elsewhere"
    assert fingerprint({"model": other}) == fingerprint({"model": Model()}) != fingerprint({"model": Model(2.0)})
    assert fingerprint({"one": Model()}) != fingerprint({"other": Model()})


def test_a_float_is_not_the_whole_number_of_the_same_bytes() -> None:
    names = (torch.float32, torch.int32, torch.float64, torch.int64)
    assert len({tensors_hash({"x": torch.zeros(2, dtype=dtype)}) for dtype in names}) == len(names)


def test_the_device_of_an_encoder_matters(tiny_clip_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = ClipEncoder.from_pretrained(tiny_clip_dir)
    before = encoder.fingerprint()
    monkeypatch.setattr(type(encoder._model), "device", torch.device("cuda", 0))
    assert encoder.fingerprint() != before
