"""Preservation sets: what they hold, what determines them, and how a build goes on after a kill."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs.atomic import locked_folder
from cat_rs.errors import CatRsError, InvalidValueError, ShapeError
from cat_rs.evaluation import EvaluationConfig, EvaluationFileError, EvaluationInputError, generate_pictures
from cat_rs.evaluation.fingerprint import tensors_hash
from cat_rs.training.model import encode_caption, load_pipeline
from cat_rs.training.preservation_set import PreservationSet, content_key
from tests.evaluation.conftest import CountingPipeline, Stopped
from tests.models import add_lora, batch
from tests.ranks import RANKS, join_group, on_ranks

pytest.importorskip("diffusers")

PROMPTS = ["a dog", "a red car", "a house"]
# Two pictures of each prompt, in batches that do not divide their number.
SAMPLING = EvaluationConfig(num_inference_steps=2, guidance_scale=2.0, seeds=(0, 5), batch_size=4)
CPU = torch.device("cpu")


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_pipeline(str(folder), dtype, CPU)


@pytest.fixture
def pipeline(tiny_pipeline_dir: Path) -> Any:
    return loaded(tiny_pipeline_dir)


Build = Callable[..., PreservationSet]


@pytest.fixture
def build(pipeline: Any, tmp_path: Path) -> Build:
    """Builds a set; arguments override."""

    def make(**settings: Any) -> PreservationSet:
        given = {"pipeline": pipeline, "prompts": PROMPTS, "path": tmp_path / "set.safetensors", "sampling": SAMPLING}
        return PreservationSet.build(**given | {"progress": False} | settings)

    return make


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_set_holds_the_base_models_own_latents(build: Build, pipeline: Any) -> None:
    built = build()
    assert (len(built), built.draws) == (6, 0)
    assert built.prompts == ("a dog", "a dog", "a red car", "a red car", "a house", "a house")
    expected = generate_pictures(pipeline, PROMPTS, SAMPLING, progress=False).latents
    drawn = built.draw(40, generator())
    assert set(drawn.pictures.tolist()) == set(range(6))
    assert torch.equal(drawn.samples.latents, expected[drawn.pictures])
    assert drawn.samples[1:] == (None,) * len(drawn.samples[1:])
    words = [encode_caption(pipeline, built.prompts[picture])["encoder_hidden_states"] for picture in drawn.pictures]
    assert torch.equal(drawn.cond["encoder_hidden_states"], torch.stack(words))


def test_a_generator_repeats_its_draws(build: Build) -> None:
    built = build(draws=3)
    one, other = built.draw(5, generator(3)), built.draw(5, generator(3))
    assert torch.equal(one.pictures, other.pictures)
    assert one.samples.noise is not None
    assert torch.equal(one.samples.noise, other.samples.noise)
    assert not torch.equal(one.pictures, built.draw(5, generator(4)).pictures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_draws_are_the_base_models_predictions(
    build: Build, tiny_pipeline_dir: Path, dtype: torch.dtype
) -> None:
    pipeline = loaded(tiny_pipeline_dir, dtype)
    built = build(pipeline=pipeline, draws=3)
    assert built.draws == 3
    drawn = built.draw(30, generator())
    samples = drawn.samples
    noisy = pipeline.scheduler.add_noise(samples.latents, samples.noise, samples.timesteps)
    with torch.no_grad():
        expected = pipeline.unet(noisy, samples.timesteps, **drawn.cond).sample
    assert samples.latents.dtype == samples.noise.dtype == dtype
    assert len(samples.timesteps.unique()) > 6
    error = (samples.base_pred.float() - expected.float()).norm() / expected.float().norm()
    assert error < (4e-3 if dtype == torch.float32 else 2e-2)


def test_sdxl_pictures_are_conditioned_on_their_size(build: Build, tiny_sdxl_pipeline_dir: Path) -> None:
    pipeline = loaded(tiny_sdxl_pipeline_dir)
    built = build(pipeline=pipeline, draws=2, sampling=replace(SAMPLING, height=32))
    drawn = built.draw(8, generator())
    added = drawn.cond["added_cond_kwargs"]
    assert added["time_ids"].tolist() == [[32, 16, 0, 0, 32, 16]] * 8
    pooled = [encode_caption(pipeline, built.prompts[index])["added_cond_kwargs"]["text_embeds"] for index in drawn[2]]
    assert torch.equal(added["text_embeds"], torch.stack(pooled))
    samples = drawn.samples
    noisy = pipeline.scheduler.add_noise(samples.latents, samples.noise, samples.timesteps)
    with torch.no_grad():
        expected = pipeline.unet(noisy, samples.timesteps, **drawn.cond).sample
    assert (samples.base_pred.float() - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("draws", [0, 2])
def test_one_set_serves_two_adapters(
    build: Build, tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draws: int
) -> None:
    build(draws=draws)
    for seed in (1, 2):
        pipeline = loaded(tiny_pipeline_dir)
        unet = add_lora(pipeline.unet, seed=seed, start=True)
        preserved = PreservationSet.load(tmp_path / "set.safetensors", unet, pipeline.scheduler)
        step = cat_rs.CatStep(unet, pipeline.scheduler, lr=1e-2, generator=generator())
        sizes: list[int] = []
        unet.conv_in.register_forward_pre_hook(lambda _, given, sizes=sizes: sizes.append(len(given[0])))
        choices, cat = generator(seed), []
        for number in range(3):
            concept = batch(number)
            cond = concept["cond"][:, :1].expand(-1, 40, -1)
            drawn = preserved.draw(3, choices)
            metrics = step(concept["latents"], cond, drawn.cond, preserve=drawn.samples)
            cat.append(float(metrics.cat))
        # Two of the concept and three of the set; before it, the base model for the three.
        assert sizes == ([5] * 3 if draws else [3, 5] * 3)
        assert cat[0] < 1e-4
        assert cat[2] > cat[0]


def test_a_killed_build_goes_on_where_it_stopped(build: Build, pipeline: Any, tmp_path: Path) -> None:
    counting = CountingPipeline(pipeline)
    build(pipeline=counting, draws=2, path=tmp_path / "whole.safetensors")
    counting.pictures.clear()
    counting.stop_at = 1
    with pytest.raises(Stopped):
        build(pipeline=counting, draws=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.safetensors.parts", "whole.safetensors"]
    (finished,) = (tmp_path / "set.safetensors.parts").glob("*.safetensors")
    counting.stop_at = None
    counting.pictures.clear()
    build(pipeline=counting, draws=2)
    assert [count for _, count in counting.pictures] == [2]
    assert not finished.parent.exists()
    assert (tmp_path / "set.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_batch_that_was_cut_short_is_made_anew(build: Build, pipeline: Any, tmp_path: Path) -> None:
    counting = CountingPipeline(pipeline)
    build(pipeline=counting, path=tmp_path / "whole.safetensors")
    counting.pictures.clear()
    counting.stop_at = 1
    with pytest.raises(Stopped):
        build(pipeline=counting)
    counting.stop_at = None
    (finished,) = (tmp_path / "set.safetensors.parts").glob("*.safetensors")
    finished.write_bytes(finished.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="is broken and is made anew"):
        build(pipeline=counting)
    assert (tmp_path / "set.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_set_that_is_there_is_only_read(build: Build, pipeline: Any, tmp_path: Path) -> None:
    counting = CountingPipeline(pipeline)
    first = build(pipeline=counting, path=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{first.key}.safetensors"]
    counting.pictures.clear()
    second = build(pipeline=counting, path=tmp_path)
    assert counting.pictures == []
    assert second.key == first.key
    # Another set has another name there, and takes the place of a file that is named.
    build(path=tmp_path, draws=1)
    assert len(list(tmp_path.iterdir())) == 2
    file = tmp_path / f"{first.key}.safetensors"
    assert build(pipeline=counting, path=file, prompts=PROMPTS[:1]).prompts == ("a dog",) * 2
    file.write_bytes(file.read_bytes()[:100])
    assert len(build(pipeline=counting, path=tmp_path)) == 6


def test_a_second_build_waits_for_the_first(
    build: Build, pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counting = CountingPipeline(pipeline)
    build(pipeline=counting, path=tmp_path / "made")
    counting.pictures.clear()
    with ThreadPoolExecutor(1) as pool:
        with locked_folder(tmp_path / "set.safetensors.parts"):
            second = pool.submit(build, pipeline=counting, progress=True)
            while "waiting for another process, which draws it" not in capsys.readouterr().err:
                assert not second.done()
            shutil.copy(tmp_path / "made", tmp_path / "set.safetensors")
        assert len(second.result()) == 6
    assert counting.pictures == []


def test_a_build_leaves_torchs_random_state_and_the_model_alone(build: Build, pipeline: Any) -> None:
    pipeline.unet.train()
    before = torch.get_rng_state()
    build(draws=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert pipeline.unet.training


def _other_weights(pipeline: Any) -> None:
    next(pipeline.unet.parameters()).data += 1e-3


def _other_text(pipeline: Any) -> None:
    next(pipeline.text_encoder.parameters()).data += 1e-3


def _other_sampler(pipeline: Any) -> None:
    from diffusers import EulerDiscreteScheduler

    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)


@pytest.mark.parametrize("change", [_other_weights, _other_text, _other_sampler])
def test_the_key_depends_on_the_model_and_its_sampler(pipeline: Any, change: Callable[[Any], None]) -> None:
    before = content_key(pipeline, PROMPTS, SAMPLING, 0)
    assert content_key(pipeline, PROMPTS, SAMPLING, 0) == before
    change(pipeline)
    assert content_key(pipeline, PROMPTS, SAMPLING, 0) != before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 3),
        ("guidance_scale", 2.5),
        ("seeds", (0, 6)),
        ("height", 32),
        ("width", 32),
        ("prompts", PROMPTS[::-1]),
        ("prompts", PROMPTS[:2]),
        ("draws", 1),
    ],
)
def test_the_key_depends_on_prompts_and_settings(pipeline: Any, name: str, value: Any) -> None:
    def key(prompts: Any = PROMPTS, draws: int = 0, **sampling: Any) -> str:
        return content_key(pipeline, prompts, replace(SAMPLING, **sampling), draws)

    assert key(**{name: value}) != key()
    # Batches change pictures by rounding alone.
    assert key(batch_size=1) == key()


def test_the_models_own_size_is_that_size(build: Build) -> None:
    assert build().key == build(sampling=replace(SAMPLING, height=16, width=16)).key


def test_another_model_is_refused(build: Build, pipeline: Any, tmp_path: Path) -> None:
    build(draws=1)
    path = tmp_path / "set.safetensors"
    _other_weights(pipeline)
    with pytest.raises(InvalidValueError, match=r"`path`, .*set.safetensors, must be of this base model \("):
        PreservationSet.load(path, pipeline.unet, pipeline.scheduler)


def test_another_schedule_is_refused(build: Build, pipeline: Any, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    build(draws=1)
    path = tmp_path / "set.safetensors"
    with pytest.raises(InvalidValueError, match="must be of this scheduler's noise schedule, got one of another"):
        PreservationSet.load(path, pipeline.unet, DDIMScheduler(beta_start=0.01))
    other = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(InvalidValueError, match="must be of prediction type 'v_prediction', got one of 'epsilon'"):
        PreservationSet.load(path, pipeline.unet, other)


def test_files_that_are_no_set_are_refused(build: Build, pipeline: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "set.safetensors"
    with pytest.raises(FileNotFoundError):
        PreservationSet.load(path, pipeline.unet, pipeline.scheduler)
    for metadata in ({"format": "pt"}, {"format": "cat-rs preservation set 1"}):
        save_file({"latents": torch.ones(1)}, path, metadata)
        with pytest.raises(InvalidValueError, match=r"PreservationSet.load: `path` must be a .* set"):
            PreservationSet.load(path, pipeline.unet, pipeline.scheduler)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": torch.tensor([0, -1])},
        {"prompt": torch.tensor([0, 2])},
        {"prompt": torch.tensor([0])},
        {"latents": "nan"},
        {"base_pred": "nan"},
        {"timesteps": torch.full((2, 1), 5000)},
        {"noise": None},
    ],
    ids=str,
)
def test_sets_that_no_build_writes_are_refused(
    build: Build, pipeline: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path, broken = tmp_path / "set.safetensors", tmp_path / "broken.safetensors"
    build(path=path, prompts=["a dog", "a cat"], draws=1)
    tensors, (name, value) = load_file(path), *change.items()
    if value is None:
        del tensors[name]
    elif isinstance(value, str):
        tensors[name].view(-1)[-1] = float(value)
    else:
        tensors[name] = value
    with safe_open(path, "pt") as file:
        save_file(tensors, broken, file.metadata() | {"content": tensors_hash(tensors)})
    with pytest.raises(
        InvalidValueError, match=r"`path`, .*broken.safetensors, must have a prompt and finite latents"
    ):
        PreservationSet.load(broken, pipeline.unet, pipeline.scheduler)


@pytest.mark.parametrize("name", ["latents", "prompt", "base_pred", "schedule"])
def test_a_damaged_set_is_refused_and_in_a_cache_made_anew(
    build: Build, pipeline: Any, tmp_path: Path, name: str
) -> None:
    from safetensors import safe_open

    counting = CountingPipeline(pipeline)
    made = build(pipeline=counting, path=tmp_path, draws=1)
    file = tmp_path / f"{made.key}.safetensors"
    written = file.read_bytes()
    with safe_open(file, "pt") as opened:
        found = written.index(opened.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    damaged = bytearray(written)
    damaged[found] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(InvalidValueError, match=rf"a whole preservation set, got .*{made.key}.*, which is damaged"):
        PreservationSet.load(file, pipeline.unet, pipeline.scheduler)
    counting.pictures.clear()
    build(pipeline=counting, path=tmp_path, draws=1)
    assert sum(count for _, count in counting.pictures) == 6
    assert file.read_bytes() == written
    # It is still a set, which a build of that name replaces.
    file.write_bytes(damaged)
    build(pipeline=counting, path=file, draws=1)
    assert file.read_bytes() == written


def test_a_set_that_is_there_is_read_from_a_place_that_cannot_be_written(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()

    def read_only(_folder: Path, _waits: Any = None) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("cat_rs.training.preservation_set.locked_folder", read_only)
    assert len(build()) == 6
    with pytest.raises(EvaluationFileError, match=r"cannot write .*Read-only file system"):
        build(draws=1)


def test_files_of_others_are_not_replaced(build: Build, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("a dog\n")
    with pytest.raises(InvalidValueError, match=r"`path` must be new, or a set to replace, got .*notes.txt, which is"):
        build(path=notes)
    assert notes.read_text() == "a dog\n"
    assert list(tmp_path.iterdir()) == [notes]


def test_joined_sets_give_their_shares(build: Build, tmp_path: Path) -> None:
    large, small = build(draws=1), build(draws=1, path=tmp_path / "small.safetensors", prompts=["a cat"])
    drawn = PreservationSet.joined([small, large]).draw(4000, generator())
    assert 0.47 < (drawn.pictures < 2).float().mean() < 0.53
    joined = PreservationSet.joined([small, large], [1, 3])
    assert joined.prompts == small.prompts + large.prompts
    assert (len(joined), joined.draws) == (8, 1)
    drawn = joined.draw(4000, generator())
    assert 0.22 < (drawn.pictures < 2).float().mean() < 0.28
    picture = int((drawn.pictures == 7).nonzero()[0])
    last = large.draw(100, generator())
    same = int((last.pictures == 5).nonzero()[0])
    for one, other in ((drawn.samples, last.samples), (drawn.cond.values(), last.cond.values())):
        for ours, theirs in zip(one, other, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours[picture], theirs[same])
    # Of sets that are joined already, too.
    again = PreservationSet.joined([joined, small]).draw(4000, generator())
    assert 0.34 < ((again.pictures >= 2) & (again.pictures < 8)).float().mean() < 0.41
    assert joined.key not in (small.key, large.key, PreservationSet.joined([small, large]).key)


def test_sets_that_do_not_fit_each_other_are_refused(build: Build, tmp_path: Path) -> None:
    one = build()
    other = build(path=tmp_path / "other", sampling=replace(SAMPLING, height=32))
    stored = build(path=tmp_path / "stored", draws=1)
    for misfit in (other, stored):
        with pytest.raises(ShapeError, match="`sets` must have tensors of the same shapes"):
            PreservationSet.joined([one, misfit])
    with pytest.raises(InvalidValueError, match="`sets` must be at least one PreservationSet"):
        PreservationSet.joined([])
    for shares in ([1], [1, 0], [1, -1], [1, float("inf")], 2):
        with pytest.raises(InvalidValueError, match="`shares` must be 2 finite numbers > 0"):
            PreservationSet.joined([one, one], shares)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "`prompts` must be a sequence of texts, at least one"),
        ({"prompts": "a dog"}, "`prompts` must be a sequence of texts, at least one"),
        ({"prompts": ["a dog", 3]}, "`prompts` must be a sequence of texts, at least one"),
        ({"prompts": ["\ud800"]}, "`prompts` must be a sequence of texts, at least one"),
        ({"pipeline": "model"}, "`pipeline` must be a Stable Diffusion or SDXL pipeline, got 'model'"),
        ({"draws": -1}, "`draws` must be an integer of at least 0, got -1"),
        ({"path": 3}, "`path` must be a path"),
        ({"sampling": {"seeds": [0]}}, "`sampling` must be an EvaluationConfig or None"),
    ],
)
def test_arguments_are_checked(build: Build, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"PreservationSet.build: {message}"):
        build(**settings)


def test_a_pipeline_with_an_adapter_is_refused(build: Build, pipeline: Any) -> None:
    add_lora(pipeline.unet)
    with pytest.raises(EvaluationInputError, match="expected the base model, got one with the adapters"):
        build()


def test_latents_that_are_not_finite_are_refused(build: Build, pipeline: Any) -> None:
    next(pipeline.unet.parameters()).data.fill_(float("nan"))
    with pytest.raises(InvalidValueError, match="`pipeline` must draw finite latents, got others for 'a dog'"):
        build()


def test_a_place_that_cannot_be_written_is_named(build: Build, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationFileError, match=r"cannot write .*file/set.parts"):
        build(path=tmp_path / "file" / "set")


def test_a_size_that_cannot_be_drawn_leaves_nothing(build: Build, tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match="height"):
        build(sampling=replace(SAMPLING, height=33, width=33))
    assert list(tmp_path.iterdir()) == []


def test_draws_are_checked(build: Build) -> None:
    built = build()
    for count in (0, 1.5, None):
        with pytest.raises(InvalidValueError, match=r"PreservationSet.draw: `count` must be an integer of at least 1"):
            built.draw(count)
    with pytest.raises(CatRsError, match=r"`generator` must be a torch.Generator or None"):
        built.draw(1, 3)


def _build_together(rank: int, folder: Path, model: Path) -> None:
    join_group(rank, folder)
    counting = CountingPipeline(loaded(model))
    sampling = replace(SAMPLING, batch_size=1)
    path = folder / "set.safetensors"
    built = PreservationSet.build(counting, PROMPTS, path, sampling=sampling, draws=1, progress=False)
    torch.save([len(built), sum(count for _, count in counting.pictures)], folder / f"results-{rank}.pt")


def test_ranks_share_the_pictures(build: Build, pipeline: Any, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    assert on_ranks(_build_together, tmp_path, tiny_pipeline_dir) == [[6, 6 // RANKS]] * RANKS
    build(
        pipeline=CountingPipeline(pipeline),
        path=tmp_path / "alone",
        sampling=replace(SAMPLING, batch_size=1),
        draws=1,
    )
    assert (tmp_path / "set.safetensors").read_bytes() == (tmp_path / "alone").read_bytes()
