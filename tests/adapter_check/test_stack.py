"""Adapters together: effects kept, damage added, concepts that appear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cat_rs
from cat_rs.adapter_check import CheckResult, StackCheck
from cat_rs.adapter_check.prompts import GENERAL
from cat_rs.adapter_check.stack import effect_kept, trigger_kind
from cat_rs.errors import AdapterError, InvalidValueError
from cat_rs.evaluation import EvaluationConfig, PictureGrid
from cat_rs.evaluation.measures import BASE
from cat_rs.evaluation.scores import Embedded
from tests.evaluation.conftest import CountingPipeline, noise_picture, write_adapter
from tests.models import add_lora

CONFIG = EvaluationConfig(num_inference_steps=1, guidance_scale=1.0, seeds=(0, 1), batch_size=16)
LIMIT = 3


@pytest.fixture
def adapters(adapter_dir: Path, tiny_pipeline_dir: Path, tmp_path: Path) -> dict[str, Path]:
    """Two adapters with a trigger each, and one that does nothing and has none."""
    other = write_adapter(tiny_pipeline_dir, tmp_path / "other", seed=5)
    files = {}
    for name, folder, trigger in (("a", adapter_dir, {"sks": "cat"}), ("b", other, {"zwx": "dog"})):
        metadata = {"trigger": trigger}
        files[name] = cat_rs.save_lora(tmp_path / f"{name}.safetensors", cat_rs.load_lora(folder), metadata=metadata)
    nothing = cat_rs.merge_loras([adapter_dir], [0.0]).lora
    return {**files, "nothing": cat_rs.save_lora(tmp_path / "nothing.safetensors", nothing)}


def checked(pipeline: Any, encoder: Path, adapters: dict[str, Path], **settings: Any) -> CheckResult:
    return cat_rs.check(
        adapters,
        pipeline,
        encoder,
        **{"limit": LIMIT, "scales": (1.0,), "stack": True, "config": CONFIG, "progress": False, **settings},
    )


def stacked(*arguments: Any, **settings: Any) -> StackCheck:
    found = checked(*arguments, **settings).stack
    assert found is not None
    return found


def embedded(vectors: list[list[float]]) -> Embedded:
    count = len(vectors)
    pictures = tuple(noise_picture(number) for number in range(count))
    return Embedded(tuple(map(str, range(count))), 1, torch.tensor(vectors), pictures, torch.zeros(count, 1))


def test_the_share_of_an_effect() -> None:
    base, alone = embedded([[1.0, 0.0, 0.0]] * 2), embedded([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    for other, expected in ((alone, 1.0), (base, 0.0), (embedded([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), 0.5)):
        kept = effect_kept(base, alone, other)
        assert kept is not None
        assert kept.value == pytest.approx(expected)
    assert effect_kept(base, base, alone) is None


def test_pairs_and_the_whole(counting: CountingPipeline, tiny_clip_dir: Path, adapters: dict[str, Path]) -> None:
    # The sum has more ranks, so that its products round elsewhere; in float32, pixels would differ by one.
    counting.to(torch.float64)
    found = stacked(counting, tiny_clip_dir, adapters)
    assert [stack.name for stack in found.stacks] == ["a + b", "a + nothing", "b + nothing", "a + b + nothing"]
    assert set(found.prompts) == {GENERAL, trigger_kind("a"), trigger_kind("b")}
    both, harmless = found.stacks[0], found.stacks[1]
    for member in both.members:
        assert member.kept is not None
        assert member.intrudes is not None
        assert member.kept.low <= member.kept.value <= member.kept.high
    kept, unknown = harmless.members
    assert kept.kept is not None
    assert kept.kept.value == pytest.approx(1.0, abs=1e-3)
    assert (unknown.kept, unknown.appears, unknown.intrudes) == (None, None, None)
    assert kept.appears == kept.appears_alone
    assert (harmless.worst, harmless.added.value) == ("a", pytest.approx(0.0, abs=1e-3))
    assert both.worst in ("a", "b")
    assert "In a + nothing, 'a' keeps 100% of its own effect" in " ".join(found.findings)


def test_a_stack_draws_the_sum(pipeline: Any, tiny_clip_dir: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    two = {name: adapters[name] for name in ("a", "b")}
    found = stacked(pipeline, tiny_clip_dir, two, stack_scales=(0.5, 0.25))
    assert found.scales == {"a": 0.5, "b": 0.25}
    merged = cat_rs.merge_loras(list(two.values()), [0.5, 0.25]).lora
    file = cat_rs.save_lora(tmp_path / "merged.safetensors", merged)
    alone = checked(pipeline, tiny_clip_dir, {"merged": file}, stack=False).adapters["merged"].pictures
    assert alone is not None
    drift = alone.scales[0].kinds[GENERAL].drift
    assert drift is not None
    assert found.stacks[0].drift.value == pytest.approx(drift.value, abs=1e-4)


def test_concepts_are_told_by_their_pictures(pipeline: Any, tiny_clip_dir: Path, adapters: dict[str, Path]) -> None:
    two = {name: adapters[name] for name in ("a", "b")}
    first = stacked(pipeline, tiny_clip_dir, two)
    assert first.by_concept == ()
    assert first.grids is not None
    # The adapter's own pictures as those of its concept: nothing else is told than without them.
    grid: PictureGrid = first.grids["a"][trigger_kind("a")]
    second = stacked(pipeline, tiny_clip_dir, two, concepts={"a": list(grid.images)})
    assert second.by_concept == ("a",)
    assert second.stacks == first.stacks
    assert first.grids.keys() == {BASE, "a", "b", "a + b"}
    assert not np.array_equal(grid.images[0], first.grids[BASE][trigger_kind("a")].images[0])


def test_what_cannot_be_stacked_is_refused_before_drawing(
    counting: CountingPipeline, tiny_clip_dir: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    unet = add_lora(counting.unet, use_dora=True, target_modules=["to_q"])
    dora = cat_rs.save_lora(tmp_path / "dora.safetensors", unet)
    counting.unload_lora_weights()
    with pytest.raises(AdapterError, match="DoRA"):
        checked(counting, tiny_clip_dir, {"a": adapters["a"], "dora": dora})
    for settings, text in (
        ({"stack_scales": (1.0,)}, "`stack_scales` must be a finite number for each of 3 adapters"),
        ({"concepts": {"x": tmp_path}}, "`concepts` must be pictures by adapter"),
    ):
        with pytest.raises(InvalidValueError, match=text):
            checked(counting, tiny_clip_dir, adapters, **settings)
    with pytest.raises(InvalidValueError, match="`stack` must be False for a single adapter"):
        checked(counting, tiny_clip_dir, {"a": adapters["a"]})
    assert counting.pictures == []
