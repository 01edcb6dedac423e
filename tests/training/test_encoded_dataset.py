"""What the loop reads: computed once, drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cat_rs.training.captions import pair_captions
from cat_rs.training.config import TrainConfig
from cat_rs.training.dataset import crop_square, load_picture, read_folder
from cat_rs.training.encoded_dataset import EncodedDataset, encode_dataset
from cat_rs.training.errors import DatasetError
from cat_rs.training.model import encode_caption, encode_pixels, load_pipeline
from tests.conftest import draw_picture


@pytest.fixture
def pipeline(tiny_pipeline_dir: Path) -> Any:
    """The tiny pipeline as training loads it."""
    return load_pipeline(str(tiny_pipeline_dir), torch.float32, torch.device("cpu"))


def build(pipeline: Any, folder: Path, **settings: Any) -> EncodedDataset:
    config = TrainConfig(model="model", data=str(folder), trigger=("sks",), **settings)
    examples = read_folder(folder)
    return encode_dataset(pipeline, examples, pair_captions([example.caption for example in examples], config), config)


def test_encoders_run_once_for_each_picture_and_caption(
    pipeline: Any, concept_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"vae": 0, "text": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **settings)

        return call

    monkeypatch.setattr(pipeline.vae, "encode", counted("vae", pipeline.vae.encode))
    monkeypatch.setattr(pipeline.text_encoder, "forward", counted("text", pipeline.text_encoder.forward))
    cache = build(pipeline, concept_dir)
    for _ in range(3):
        cache.batch([0, 1, 2, 0], torch.Generator())
    assert calls == {"vae": 3, "text": 6}


def test_batch_holds_both_captions_of_each_picture(pipeline: Any, concept_dir: Path) -> None:
    batch = build(pipeline, concept_dir).batch([2, 0], torch.Generator())
    assert batch.latents.shape == (2, 4, 8, 8)
    for conditioning, captions in (
        (batch.cond, ["a sks cat on a blue background", "a sks cat on a red background"]),
        (batch.cond_no_trigger, ["a cat on a blue background", "a cat on a red background"]),
    ):
        expected = torch.stack([encode_caption(pipeline, text)["encoder_hidden_states"] for text in captions])
        assert torch.equal(conditioning["encoder_hidden_states"], expected)


def test_latents_are_those_of_the_vae(pipeline: Any, concept_dir: Path) -> None:
    cache = build(pipeline, concept_dir)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([cache.batch([1], generator).latents[0] for _ in range(500)])
    view = cache._views[1][0]
    torch.testing.assert_close(draws.mean(0), view.mean, atol=6 * float(view.std.max()) / 500**0.5, rtol=0)
    torch.testing.assert_close(draws.std(0), view.std, atol=0, rtol=0.2)


@pytest.mark.parametrize(
    ("settings", "views"),
    [({}, 1), ({"flip": True}, 2), ({"crop": "random", "crops": 3}, 3), ({"crop": "random", "flip": True}, 8)],
    ids=["center", "flip", "random", "random-flip"],
)
def test_every_view_is_prepared(pipeline: Any, concept_dir: Path, settings: dict[str, Any], views: int) -> None:
    cache = build(pipeline, concept_dir, **settings)
    assert [len(prepared) for prepared in cache._views] == [views] * 3


def test_sdxl_is_told_where_each_latent_was_cut(tiny_sdxl_pipeline_dir: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(tiny_sdxl_pipeline_dir), torch.float32, torch.device("cpu"))
    for number, size in enumerate([(16, 48), (64, 20)]):
        draw_picture(tmp_path / f"{number}.png", "red", size)
        (tmp_path / f"{number}.txt").write_text("a sks cat")
    data = build(pipeline, tmp_path, crop="random", crops=3, seed=5)
    # The crops as the settings draw them, in the order of the pictures.
    drawn = torch.Generator().manual_seed(5)
    crops = [
        [crop_square(load_picture(tmp_path / f"{number}.png"), 16, drawn) for _ in range(3)] for number in range(2)
    ]
    views = [crop for of_picture in crops for crop in of_picture]
    expected = torch.tensor([[*crop.original_size, *crop.top_left, 16, 16] for crop in views], dtype=torch.float32)
    assert len(expected.unique(dim=0)) == len(views)
    means, _, conditioning = data.all_views()
    torch.testing.assert_close(means, torch.stack([encode_pixels(pipeline, crop.pixels)[0] for crop in views]))
    assert torch.equal(conditioning["added_cond_kwargs"]["time_ids"], expected)
    for seed in range(4):
        chosen = data.batch([1, 0], torch.Generator().manual_seed(seed), from_bank=True).latents
        batch = data.batch([1, 0], torch.Generator().manual_seed(seed))
        for cond in (batch.cond, batch.cond_no_trigger):
            assert torch.equal(cond["added_cond_kwargs"]["time_ids"], expected[chosen])


def test_prompts_to_preserve_take_their_share(pipeline: Any, concept_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\na red car\n")
    cache = build(pipeline, concept_dir, preserve_prompts=str(tmp_path / "prompts.txt"), preserve_share=0.25)
    embeddings = {
        text: encode_caption(pipeline, text)["encoder_hidden_states"]
        for text in ("a dog", "a red car", "a cat on a red background")
    }
    generator = torch.Generator().manual_seed(0)
    batch = cache.batch([0] * 400, generator)
    counts = {
        text: sum(torch.equal(row, value) for row in batch.cond_no_trigger["encoder_hidden_states"])
        for text, value in embeddings.items()
    }
    assert sum(counts.values()) == 400
    # Within four standard deviations of the expected 50, 50 and 300.
    assert all(abs(counts[text] - 50) < 27 for text in ("a dog", "a red car"))
    expected = encode_caption(pipeline, "a sks cat on a red background")["encoder_hidden_states"]
    assert all(torch.equal(row, expected) for row in batch.cond["encoder_hidden_states"])


def test_views_and_prompts_are_chosen_by_a_generator_of_the_cpu(
    pipeline: Any, concept_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\na red car\n")
    cache = build(pipeline, concept_dir, flip=True, preserve_prompts=str(tmp_path / "prompts.txt"))
    # One of a GPU, which nothing is drawn from with a bank.
    of_the_device: Any = None
    first, second = (
        cache.batch([0] * 20, of_the_device, torch.Generator().manual_seed(1), from_bank=True) for _ in range(2)
    )
    assert len(set(first.latents.tolist())) == 2
    assert torch.equal(first.latents, second.latents)
    prompts = [batch.cond_no_trigger["encoder_hidden_states"] for batch in (first, second)]
    assert torch.equal(*prompts)


def test_batches_for_a_bank_name_the_views_they_are_of(pipeline: Any, concept_dir: Path) -> None:
    cache = build(pipeline, concept_dir, flip=True)
    mean, std, cond_no_trigger = cache.all_views()
    assert mean.shape == std.shape == (6, 4, 8, 8)
    seen = set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        batch = cache.batch([2, 0], generator, from_bank=True)
        assert batch.latents.dtype == torch.int64
        seen |= set(batch.latents.tolist())
        again = cache.batch([2, 0], torch.Generator().manual_seed(seed))
        noise = torch.randn(again.latents.shape, generator=generator)
        assert torch.equal(again.latents, mean[batch.latents] + std[batch.latents] * noise)
        expected = cond_no_trigger["encoder_hidden_states"][batch.latents]
        assert torch.equal(batch.cond_no_trigger["encoder_hidden_states"], expected)
        assert torch.equal(batch.cond["encoder_hidden_states"], again.cond["encoder_hidden_states"])
    assert seen == {0, 1, 4, 5}


@pytest.mark.parametrize("pipelines", ["tiny_pipeline_dir", "tiny_sdxl_pipeline_dir"])
def test_a_trigger_that_the_tokenizer_cuts_off_is_refused(
    pipelines: str, concept_dir: Path, request: pytest.FixtureRequest
) -> None:
    pipeline = load_pipeline(str(request.getfixturevalue(pipelines)), torch.float32, torch.device("cpu"))
    # The tiny tokenizer reads 40 characters.
    seen, cut = "a sks cat" + 10 * " abcd", 10 * "abcd " + "a sks cat"
    for captions in ([seen, seen, cut], [cut] * 3):
        for number, caption in enumerate(captions):
            (concept_dir / f"{number}.txt").write_text(caption)
        (concept_dir / "metadata.jsonl").unlink(missing_ok=True)
        count = captions.count(cut)
        with pytest.raises(DatasetError, match=rf"trigger: .* got {count} captions .* such as 'abcd .*a sks cat'"):
            build(pipeline, concept_dir)
        build(pipeline, concept_dir, cat_factor=0.0)
    for number in range(3):
        (concept_dir / f"{number}.txt").write_text(seen)
    assert len(build(pipeline, concept_dir)) == 3
