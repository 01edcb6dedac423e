"""Two processes evaluate together: each makes a share of the batches, and both get the result of one process."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from cat_rs.cli import main
from cat_rs.errors import CatRsError
from cat_rs.evaluation import EvaluationConfig, EvaluationPrompts, EvaluationResult, evaluate
from cat_rs.processes import Processes
from tests.ranks import RANKS, join_group, on_ranks

from .conftest import CountingPipeline, noise_picture

if not dist.is_available():
    pytest.skip("this PyTorch is built without torch.distributed", allow_module_level=True)

ARGUMENTS = ["--trigger", "sks", "--class-word", "cat", "--inference-steps", "2", "--picture-batch", "4"]
PROMPTS = ("a sks cat on a red background", "a photo of a sks cat")


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """An encoder without a fingerprint."""
    return torch.stack([torch.tensor(list(image.resize((4, 4)).tobytes()), dtype=torch.float) for image in images]) + 1


def settings(model: Path, adapter: Path, clip: Path) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    return {
        "pipeline": CountingPipeline(pipeline),
        "adapters": {"mine": adapter, "control": None},
        "prompts": EvaluationPrompts.from_trigger_prompts(list(PROMPTS), ["sks"], "cat"),
        "encoder": clip,
        "concept_images": [noise_picture(seed) for seed in range(3)],
        "config": EvaluationConfig(num_inference_steps=2, guidance_scale=2.0, seeds=(0, 1, 5), batch_size=4),
        "progress": False,
    }


def seen(result: EvaluationResult) -> tuple[Any, ...]:
    """Everything of a result that can be compared: the scores, the pictures, the latents."""
    assert result.pictures is not None
    models = [result.pictures.base, *result.pictures.adapters.values()]
    grids = [grid for model in models for grid in (model.trigger, model.no_trigger)]
    images = [image.tobytes() for grid in grids for image in grid.images]
    return result.to_json(), images, [grid.latents.numpy().tobytes() for grid in grids]


def cli_arguments(folder: Path, model: Path, adapter: Path, clip: Path, output: str) -> list[str]:
    places = ["--model", str(model), "--adapters", f"mine={adapter}", "--encoder", str(clip)]
    files = ["--data", str(folder / "concept"), "--prompts", str(folder / "prompts.txt")]
    return ["evaluate", *places, *files, *ARGUMENTS, "--output-dir", str(folder / output)]


def run_on_rank(rank: int, folder: Path, model: Path, adapter: Path, clip: Path) -> None:
    join_group(rank, folder)
    given = settings(model, adapter, clip)
    results: dict[str, Any] = {}

    def run(name: str, **changed: Any) -> None:
        given["pipeline"].pictures.clear()
        try:
            results[name] = seen(evaluate(**{**given, **changed}))
        except CatRsError as error:
            results[name] = f"{type(error).__name__}: {error}"
        results[f"{name}, pictures"] = sum(count for _, count in given["pipeline"].pictures)

    run("gathered")
    run("cached", cache=folder / "cache")
    run("cached again", cache=folder / "cache")
    run("half cached", cache=folder / "half")
    run("own folders", cache=folder / f"own-{rank}")
    run("callable", encoder=pixels, cache=folder / "cache")
    run("alone", processes=Processes())
    blind = pixels if rank == 0 else lambda images: pixels(images) * float(images[0].size == (20, 16))
    run("blind in one", encoder=blind)
    run("unlike", config=EvaluationConfig(num_inference_steps=2, seeds=(0, 1 + rank)), cache=folder / "cache")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        results["status"] = main(cli_arguments(folder, model, adapter, clip, "launched"))
    results["printed"] = printed.getvalue()
    torch.save(results, folder / f"results-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "concept").mkdir()
    noise_picture(0).save(folder / "concept" / "0.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, tiny_pipeline_dir: Path, adapter_dir: Path, tiny_clip_dir: Path) -> Callable[..., Any]:
    """Return a function that evaluates in this process."""
    given = settings(tiny_pipeline_dir, adapter_dir, tiny_clip_dir)
    return lambda **changed: seen(evaluate(**{**given, **changed}))


@pytest.fixture(scope="module")
def ranks(
    folder: Path, alone: Callable[..., Any], tiny_pipeline_dir: Path, adapter_dir: Path, tiny_clip_dir: Path
) -> list[dict[str, Any]]:
    # As in each rank, and in the tests: a picture differs by rounding with the number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone(cache=folder / "half")
    torch.set_num_threads(threads)
    for kind in ("pictures", "embeddings"):
        for file in sorted((folder / "half" / kind).iterdir())[::3]:
            file.unlink()
    return on_ranks(run_on_rank, folder, tiny_pipeline_dir, adapter_dir, tiny_clip_dir)


@pytest.mark.parametrize("name", ["gathered", "cached", "cached again", "half cached", "alone"])
def test_result_is_that_of_one_process(ranks: list[dict[str, Any]], alone: Callable[..., Any], name: str) -> None:
    whole = alone()
    for results in ranks:
        assert results[name] == whole


def test_batches_are_taken_in_turns(ranks: list[dict[str, Any]]) -> None:
    counts = {name: [results[f"{name}, pictures"] for results in ranks] for name in ("gathered", "cached")}
    # 4, 2, 4, 2, ... pictures of three models with the trigger and without. The cache knows the control for the base.
    assert counts == {"gathered": [24, 12], "cached": [16, 8]}
    assert [results["cached again, pictures"] for results in ranks] == [0, 0]
    # Of the eight batches in the cache, three were taken away.
    assert all(results["half cached, pictures"] > 0 for results in ranks)
    assert [results["alone, pictures"] for results in ranks] == [36] * RANKS


def test_embeddings_of_a_callable_are_passed_on(ranks: list[dict[str, Any]], alone: Callable[..., Any]) -> None:
    whole = alone(encoder=pixels)
    for results in ranks:
        assert results["callable"] == whole


def test_folders_that_are_not_shared_are_named(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "EvaluationFileError: cache: expected a folder that all processes share, got" in results["own folders"]


def test_an_error_in_one_process_is_one_in_all(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["blind in one"].startswith(
            "EvaluationInputError: encoder: expected a finite, non-zero embedding"
        )


def test_processes_with_other_settings_are_refused(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "processes: expected the same model, adapters, prompts and settings" in results["unlike"]


def test_command_line_writes_once(
    ranks: list[dict[str, Any]],
    folder: Path,
    tiny_pipeline_dir: Path,
    adapter_dir: Path,
    tiny_clip_dir: Path,
) -> None:
    assert [results["status"] for results in ranks] == [0, 0]
    assert ranks[0]["printed"].count("results: ") == 1
    assert ranks[1]["printed"] == ""
    arguments = cli_arguments(folder, tiny_pipeline_dir, adapter_dir, tiny_clip_dir, "single")
    assert main(arguments) == 0
    single, launched = ((folder / name / "results.json").read_text() for name in ("single", "launched"))
    assert json.loads(launched) == json.loads(single)
    for name in ("single", "launched"):
        shutil.rmtree(folder / name)
