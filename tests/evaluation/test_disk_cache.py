"""The cache: nothing is generated twice, nothing else is taken for it, and nothing broken is trusted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cat_rs import load_lora, save_lora
from cat_rs.evaluation import (
    ClipEncoder,
    EvaluationConfig,
    EvaluationFileError,
    EvaluationInputError,
    EvaluationPrompts,
    EvaluationResult,
    KpsEvaluator,
    ModelPictures,
    ScaledAdapter,
    evaluate,
)
from cat_rs.evaluation.disk_cache import EvaluationCache
from cat_rs.evaluation.generation import PictureRequest, request_batches
from cat_rs.evaluation.task import scaled

from .conftest import CountingPipeline, Stopped, write_adapter

Evaluate = Callable[..., EvaluationResult]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def evaluated(
    counting: CountingPipeline,
    adapter_dir: Path,
    tiny_clip_dir: Path,
    prompts: EvaluationPrompts,
    config: EvaluationConfig,
    concept_images: list[Image.Image],
) -> Evaluate:
    """Return a function that evaluates one adapter, with any setting replaced."""

    def run(**settings: Any) -> EvaluationResult:
        arguments: dict[str, Any] = {
            "pipeline": counting,
            "adapters": {"mine": adapter_dir},
            "prompts": prompts,
            "encoder": tiny_clip_dir,
            "concept_images": concept_images,
            "config": config,
            "progress": False,
            **settings,
        }
        return evaluate(**arguments)

    return run


def assert_same_pictures(left: ModelPictures, right: ModelPictures) -> None:
    for one, other in ((left.trigger, right.trigger), (left.no_trigger, right.no_trigger)):
        assert torch.equal(one.latents, other.latents)
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
        assert {image.mode for image in other.images} == {"RGB"}


def assert_identical(left: EvaluationResult, right: EvaluationResult) -> None:
    """Bit for bit, the pictures included."""
    assert left.to_json() == right.to_json()
    assert left.pictures is not None
    assert right.pictures is not None
    assert_same_pictures(left.pictures.base, right.pictures.base)
    assert left.pictures.adapters.keys() == right.pictures.adapters.keys()
    for name, model in left.pictures.adapters.items():
        assert_same_pictures(model, right.pictures.adapters[name])


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_second_evaluation_calls_neither_pipeline_nor_encoder(
    counting: CountingPipeline,
    evaluated: Evaluate,
    cache: Path,
    concept_images: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = evaluated()
    counting.pictures.clear()
    first = evaluated(cache=cache)
    assert sum(count for _, count in counting.pictures) == 24
    counting.pictures.clear()
    kept, embedded, loaded = files(cache), [], []
    encode = ClipEncoder.encode_images

    def counted(self: ClipEncoder, images: Any) -> torch.Tensor:
        embedded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(ClipEncoder, "encode_images", counted)
    monkeypatch.setattr("cat_rs.evaluation.batches.adapters_loaded", lambda *_: loaded.append(1))
    second = evaluated(cache=cache)
    assert counting.pictures == loaded == []
    assert embedded == [len(concept_images)]
    assert files(cache) == kept
    assert_identical(first, without)
    assert_identical(second, without)


def test_another_adapter_costs_its_own_pictures(
    counting: CountingPipeline,
    evaluated: Evaluate,
    adapter_dir: Path,
    tiny_pipeline_dir: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    other = write_adapter(tiny_pipeline_dir, tmp_path / "other", seed=5)
    adapters = {"mine": adapter_dir, "other": other}
    evaluated(cache=cache)
    counting.pictures.clear()
    both = evaluated(adapters=adapters, cache=cache)
    assert [count for _, count in counting.pictures] == [4, 2] * 2
    assert all(loaded for loaded, _ in counting.pictures)
    assert_identical(both, evaluated(adapters=adapters))


def test_equal_adapters_are_generated_once(
    counting: CountingPipeline, evaluated: Evaluate, adapter_dir: Path, cache: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(adapter_dir, tmp_path / "copy")
    result = evaluated(adapters={"mine": adapter_dir, "copy": copy, "base too": None}, cache=cache)
    assert sum(count for _, count in counting.pictures) == 24
    assert result.adapters["mine"] == result.adapters["copy"]
    assert result.adapters["base too"].latent_rmse is not None
    assert result.adapters["base too"].latent_rmse.value == 0


def test_stopped_evaluation_goes_on_where_it_was(
    counting: CountingPipeline, evaluated: Evaluate, tmp_path: Path
) -> None:
    whole = evaluated()
    for calls in range(8):
        counting.pictures.clear()
        counting.stop_at = calls
        with pytest.raises(Stopped):
            evaluated(cache=tmp_path / str(calls))
        counting.stop_at = None
        assert_identical(evaluated(cache=tmp_path / str(calls)), whole)
        assert len(counting.pictures) == 8


def test_stopped_while_embedding_goes_on(
    counting: CountingPipeline, evaluated: Evaluate, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = ClipEncoder.encode_images, []

    def stop_at_the_fourth(self: ClipEncoder, images: Any) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            raise Stopped
        return encode(self, images)

    whole = evaluated()
    with monkeypatch.context() as patch:
        patch.setattr(ClipEncoder, "encode_images", stop_at_the_fourth)
        with pytest.raises(Stopped):
            evaluated(cache=cache)
    # The first call is for the concept's pictures.
    assert len(list((cache / "embeddings").iterdir())) == 2
    counting.pictures.clear()
    assert_identical(evaluated(cache=cache), whole)
    assert counting.pictures == []


@pytest.mark.parametrize("kind", ["pictures", "embeddings"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:7], id="cut in the length"),
        pytest.param(lambda data: data[:100], id="cut in the header"),
        pytest.param(lambda data: data[:-1], id="last byte gone"),
        pytest.param(lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], id="one bit in the data"),
        pytest.param(lambda data: data[:12] + bytes([data[12] ^ 1]) + data[13:], id="one bit in the header"),
        pytest.param(lambda data: data + b"x", id="one byte more"),
        pytest.param(lambda data: b"\0" * len(data), id="zeros, as after a power cut"),
    ],
)
def test_broken_entry_is_made_anew(
    evaluated: Evaluate, cache: Path, kind: str, damage: Callable[[bytes], bytes]
) -> None:
    whole = evaluated(cache=cache)
    kept = files(cache)
    file = sorted((cache / kind).iterdir())[3]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=rf"cache: .*{file.name} is broken and is made anew"):
        again = evaluated(cache=cache)
    assert_identical(again, whole)
    assert files(cache) == kept


@pytest.mark.parametrize("kind", ["pictures", "embeddings"])
def test_entry_of_another_key_is_not_taken(evaluated: Evaluate, cache: Path, kind: str) -> None:
    whole = evaluated(cache=cache)
    first, second = sorted((cache / kind).iterdir())[:2]
    shutil.copy(first, second)
    with pytest.warns(UserWarning, match="is broken and is made anew: its content is not what was written"):
        assert_identical(evaluated(cache=cache), whole)


def test_picture_gone_costs_its_batch(counting: CountingPipeline, evaluated: Evaluate, cache: Path) -> None:
    whole = evaluated(cache=cache)
    next((cache / "pictures").iterdir()).unlink()
    counting.pictures.clear()
    assert_identical(evaluated(cache=cache), whole)
    assert len(counting.pictures) == 1


def test_what_a_killed_process_left_is_no_entry(evaluated: Evaluate, cache: Path) -> None:
    whole = evaluated(cache=cache)
    for file in list((cache / "pictures").iterdir()):
        file.rename(file.with_name(f".unfinished-7-{file.name}"))
    assert_identical(evaluated(cache=cache), whole)


def test_another_encoder_embeds_the_same_pictures(
    counting: CountingPipeline, evaluated: Evaluate, cache: Path, tiny_clip_dir: Path
) -> None:
    from transformers import CLIPModel, CLIPProcessor

    evaluated(cache=cache)
    counting.pictures.clear()
    model = CLIPModel.from_pretrained(tiny_clip_dir)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    encoder = (model, CLIPProcessor.from_pretrained(tiny_clip_dir))
    result = evaluated(encoder=encoder, cache=cache)
    assert counting.pictures == []
    assert len(list((cache / "embeddings").iterdir())) == 16
    assert_identical(result, evaluated(encoder=encoder))


def test_embeddings_made_in_other_batches_are_made_anew(
    counting: CountingPipeline, evaluated: Evaluate, cache: Path, tiny_clip_dir: Path
) -> None:
    def by(batch_size: int) -> EvaluationResult:
        evaluator = KpsEvaluator(ClipEncoder.from_pretrained(tiny_clip_dir), batch_size=batch_size)
        return evaluated(encoder=evaluator, cache=cache)

    # Batches of 4 and 2 pictures; an encoder that takes more of them at once computes the same.
    for batch_size, kept in ((4, 8), (32, 8), (3, 12), (1, 20)):
        by(batch_size)
        assert len(list((cache / "embeddings").iterdir())) == kept
    assert sum(count for _, count in counting.pictures) == 24


def test_embeddings_of_a_callable_are_not_kept(evaluated: Evaluate, cache: Path) -> None:
    factor = 1.0

    def encoder(images: list[Image.Image]) -> torch.Tensor:
        pixels = torch.stack(
            [torch.tensor(list(image.resize((4, 4)).tobytes()), dtype=torch.float) for image in images]
        )
        return pixels**factor + 1

    first = evaluated(encoder=encoder, cache=cache)
    assert_identical(evaluated(encoder=encoder, cache=cache), first)
    assert list((cache / "embeddings").iterdir()) == []
    factor = 2.0
    assert evaluated(encoder=encoder, cache=cache).adapters != first.adapters


class TestKeys:
    """What decides a picture is in its key, and nothing else."""

    @pytest.fixture
    def key(self, pipeline: Any, config: EvaluationConfig, tmp_path: Path, adapter_dir: Path) -> Callable[..., str]:
        def make(**changed: Any) -> str:
            given = {"pipeline": pipeline, "config": config, "prompts": ["a cat", "a dog"], "adapter": adapter_dir}
            given |= changed
            requests = request_batches(given["prompts"], given["config"])[0]
            cache = EvaluationCache(tmp_path, given["pipeline"], given["config"])
            return cache.picture_key(scaled(given["adapter"]), requests)

        return make

    def test_paths_and_use_do_not_matter(
        self,
        key: Callable[..., str],
        pipeline: Any,
        tiny_pipeline_dir: Path,
        adapter_dir: Path,
        tmp_path: Path,
        config: EvaluationConfig,
    ) -> None:
        from diffusers import StableDiffusionPipeline

        from cat_rs.evaluation import generate_pictures

        before = key()
        generate_pictures(pipeline, ["a dog"], config, adapter=adapter_dir, progress=False)
        pipeline.set_progress_bar_config(disable=True)
        assert key() == before
        assert key(adapter=adapter_dir / "pytorch_lora_weights.safetensors") == before
        copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in (tiny_pipeline_dir, adapter_dir)]
        other = StableDiffusionPipeline.from_pretrained(copies[0], safety_checker=None)
        assert key(pipeline=other, adapter=copies[1]) == before

    @pytest.mark.parametrize(
        "change",
        [
            {"num_inference_steps": 3},
            {"guidance_scale": 2.5},
            {"seeds": (0, 1, 6)},
            {"height": 16},
            {"width": 16},
            {"batch_size": 3},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_sampler_settings_matter(
        self, key: Callable[..., str], config: EvaluationConfig, change: dict[str, Any]
    ) -> None:
        assert key(config=replace(config, **change)) != key()

    def test_prompts_matter_by_place(self, key: Callable[..., str]) -> None:
        assert (
            len({key(), key(prompts=["a dog", "a cat"]), key(prompts=["a cat", "a fox"]), key(prompts=["a cat"])}) == 4
        )

    def test_adapter_matters_by_content(
        self, key: Callable[..., str], tiny_pipeline_dir: Path, tmp_path: Path
    ) -> None:
        other = write_adapter(tiny_pipeline_dir, tmp_path / "other", seed=5)
        assert len({key(), key(adapter=None), key(adapter=other)}) == 3

    def test_its_scale_matters(self, key: Callable[..., str], adapter_dir: Path) -> None:
        whole, *others = (key(adapter=ScaledAdapter(adapter_dir, scale)) for scale in (1.0, 0.5, 2.0, 3.0))
        assert whole == key()
        assert len({whole, *others}) == 4

    def test_every_file_of_a_peft_folder_matters(
        self, key: Callable[..., str], adapter_dir: Path, tmp_path: Path
    ) -> None:
        lora = load_lora(adapter_dir)
        folder = save_lora(tmp_path / "peft", lora, format="peft")
        keys = [key(adapter=folder)]
        assert key(adapter=shutil.copytree(folder, tmp_path / "copy")) == keys[0]
        assert key(adapter=shutil.copytree(folder, tmp_path / "text_encoder")) != keys[0]
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
            keys.append(key(adapter=folder))
        assert len(set(keys)) == 3

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_weights_matter(self, key: Callable[..., str], pipeline: Any, part: str) -> None:
        before = key()
        weights = list(getattr(pipeline, part).parameters())[-1]
        with torch.no_grad():
            weights.view(-1)[0] += 1e-3
        assert key() != before

    def test_dtype_scheduler_tokenizer_and_safety_checker_matter(
        self, key: Callable[..., str], pipeline: Any, tmp_path: Path
    ) -> None:
        from diffusers import DDIMScheduler, EulerDiscreteScheduler

        keys = [key()]
        scheduler = pipeline.scheduler
        pipeline.scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
        keys.append(key())
        pipeline.scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
        keys.append(key())
        pipeline.tokenizer.add_tokens(["sks"])
        keys.append(key())
        pipeline.unet.to(torch.bfloat16)
        keys.append(key())
        pipeline.safety_checker = torch.nn.Linear(1, 1)
        pipeline.safety_checker.device = torch.device("cpu")
        keys.append(key())
        assert len(set(keys)) == len(keys)

    def test_versions_and_device_matter(
        self, key: Callable[..., str], pipeline: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = key()
        for package in ("diffusers", "transformers", "peft"):
            with monkeypatch.context() as patch:
                patch.setattr(
                    "cat_rs.evaluation.fingerprint.version", lambda one, p=package: "99" if one == p else "1"
                )
                of_package = key()
                patch.setattr("cat_rs.evaluation.fingerprint.version", lambda one: "1")
                assert key() != of_package, package
        with monkeypatch.context() as patch:
            patch.setattr("cat_rs.evaluation.fingerprint.torch.__version__", "99.1.0")
            assert key() != before
        keys = []
        for device in ("cuda:0", "cuda:1"):
            monkeypatch.setattr(type(pipeline), "device", torch.device(device))
            keys.append(key())
        # Of several GPUs none is special.
        assert keys[0] == keys[1] != before

    def test_a_picture_is_that_of_its_index_and_seed(
        self, pipeline: Any, config: EvaluationConfig, tmp_path: Path
    ) -> None:
        cache = EvaluationCache(tmp_path, pipeline, config)
        requests = [PictureRequest(*values) for values in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))]
        assert len({cache.picture_key((), (request,)) for request in requests}) == len(requests)

    def test_embeddings_are_those_of_pictures_encoder_and_batch_size(
        self, pipeline: Any, config: EvaluationConfig, tmp_path: Path
    ) -> None:
        cache = EvaluationCache(tmp_path, pipeline, config)
        given = [
            ("pictures", "encoder", 4),
            ("others", "encoder", 4),
            ("pictures", "other", 4),
            ("pictures", "encoder", 3),
        ]
        assert len({cache.embedding_key(*values) for values in given}) == len(given)

    def test_unloaded_weights_are_named(self, key: Callable[..., str], pipeline: Any) -> None:
        pipeline.vae.to("meta")
        with pytest.raises(EvaluationInputError, match=r"cache: expected weights that are loaded, got vae\.encoder\."):
            key()

    def test_part_without_a_fingerprint_is_named(self, key: Callable[..., str], pipeline: Any) -> None:
        pipeline.__dict__["scheduler"] = object()
        with pytest.raises(EvaluationInputError, match=r"cache: expected modules, .* got object as scheduler"):
            key()


def test_folder_that_cannot_be_made_is_named(evaluated: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationFileError, match=r"cache: cannot make the folder .*/file/pictures"):
        evaluated(cache=tmp_path / "file")


def test_full_disk_is_an_error_and_leaves_no_part(
    counting: CountingPipeline, evaluated: Evaluate, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(EvaluationFileError, match=r"cache: cannot write .* No space left on device"):
            evaluated(cache=cache)
    assert files(cache) == {}
    assert counting.get_list_adapters() == {}
    assert_identical(evaluated(cache=cache), whole)
