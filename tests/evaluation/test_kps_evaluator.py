"""KpsEvaluator: embeddings of a transformers CLIP or a callable, and the score of pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cat_rs import kps
from cat_rs.evaluation import EvaluationFileError, EvaluationInputError, KpsEvaluator

from .conftest import noise_picture


def mean_colour(images: list[Image.Image]) -> torch.Tensor:
    """An encoder that a test can follow by hand."""
    return torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float64)).mean(dim=(0, 1)) for image in images])


def constant(value: float) -> Callable[[list[Image.Image]], torch.Tensor]:
    return lambda images: torch.full((len(images), 4), value)


def test_embeddings_are_those_of_transformers(tiny_clip_dir: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(tiny_clip_dir), CLIPProcessor.from_pretrained(tiny_clip_dir)
    images, texts = [noise_picture(seed) for seed in range(3)], ["a cat", "a red background", "x"]
    with torch.no_grad():
        output = model(**processor(text=texts, images=images, padding=True, return_tensors="pt"))
    evaluator = KpsEvaluator(tiny_clip_dir, batch_size=3)
    # The model's own output is normalized, ours is not.
    own_images = torch.nn.functional.normalize(evaluator.embed_images(images), dim=1)
    own_texts = torch.nn.functional.normalize(evaluator.embed_texts(texts), dim=1)
    torch.testing.assert_close(own_images, output.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(own_texts, output.text_embeds, rtol=0, atol=1e-5)


def test_batching_does_not_change_embeddings(tiny_clip_dir: Path) -> None:
    images, texts = [noise_picture(seed) for seed in range(5)], ["a", "a longer text", "b", "cat", "dog"]
    one, many = KpsEvaluator(tiny_clip_dir, batch_size=1), KpsEvaluator(tiny_clip_dir, batch_size=4)
    torch.testing.assert_close(one.embed_images(images), many.embed_images(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(one.embed_texts(texts), many.embed_texts(texts), rtol=0, atol=1e-5)


def test_long_text_is_cut_not_refused(tiny_clip_dir: Path) -> None:
    assert KpsEvaluator(tiny_clip_dir).embed_texts(["cat " * 100]).shape == (1, 12)


def test_folder_list_tensor_and_loaded_model_agree(tiny_clip_dir: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    images = [noise_picture(seed) for seed in range(3)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    tensor = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 255
    pair = (CLIPModel.from_pretrained(tiny_clip_dir), CLIPProcessor.from_pretrained(tiny_clip_dir))
    expected = KpsEvaluator(tiny_clip_dir).embed_images(images)
    for source in (tmp_path, tensor):
        assert torch.equal(KpsEvaluator(pair).embed_images(source), expected)


def test_score_follows_the_definition() -> None:
    rng = np.random.default_rng(0)
    parts = [[noise_picture(int(seed), size=(3, 2)) for seed in rng.integers(0, 99, 4)] for _ in range(4)]
    vectors = [mean_colour(part).numpy() for part in parts]

    def harmonic(a: np.ndarray, b: np.ndarray) -> float:
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        return float(len(a) / np.sum(2 / (1 + cosine)))

    ups, tps = harmonic(vectors[0], vectors[1]), harmonic(vectors[2], vectors[3])
    result = KpsEvaluator(mean_colour).score(*parts)
    assert result.ups == pytest.approx(ups, abs=1e-6)
    assert result.tps == pytest.approx(tps, abs=1e-6)
    assert result.kps == pytest.approx(2 / (1 / ups + 1 / tps), abs=1e-6)
    low, high = result.ups_interval
    assert low <= result.ups <= high
    of_prompts = np.array([0, 0, 1, 1])
    result = KpsEvaluator(mean_colour).score(*parts, clusters=(of_prompts, None))
    expected = kps(*vectors, clusters=(of_prompts, None))
    assert result.ups_interval == pytest.approx(expected.ups_interval, abs=1e-6)
    assert result.tps_interval == pytest.approx(expected.tps_interval, abs=1e-6)


def test_equal_pictures_score_one(tiny_clip_dir: Path) -> None:
    images = [noise_picture(seed) for seed in range(3)]
    result = KpsEvaluator(tiny_clip_dir).score(images, images, images, images)
    assert (result.kps, result.ups, result.tps) == pytest.approx((1, 1, 1), abs=1e-6)


def test_unequal_counts_are_refused() -> None:
    two, three = [noise_picture(0)] * 2, [noise_picture(0)] * 3
    with pytest.raises(EvaluationInputError, match="base_trigger as in adapted_trigger, got 2 and 3"):
        KpsEvaluator(mean_colour).score(two, two, two, three)


def test_pair_of_two_sizes_is_named(tmp_path: Path) -> None:
    noise_picture(0, (20, 16)).save(tmp_path / "a.png")
    noise_picture(1, (16, 20)).save(tmp_path / "b.png")
    pair = [noise_picture(2, (20, 16)), noise_picture(3, (20, 16))]
    expected = (
        r"got 20x16 of the picture at index 1 of base_trigger and 16x20 of the picture b\.png of adapted_trigger"
    )
    with pytest.raises(EvaluationInputError, match=expected):
        KpsEvaluator(mean_colour).score(pair, pair, pair, tmp_path)


@pytest.mark.parametrize(("value", "found"), [(0.0, "a zero vector"), (float("nan"), "NaN"), (float("inf"), "infin")])
def test_useless_embedding_names_the_picture(tmp_path: Path, value: float, found: str) -> None:
    noise_picture(0).save(tmp_path / "odd one.png")
    with pytest.raises(EvaluationInputError, match=rf"picture odd one\.png, got .*{found}"):
        KpsEvaluator(constant(value)).embed_images(tmp_path)


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2, 4, 1)], ids=str)
def test_callable_with_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    expected = re.escape(f"expected embeddings [2, D], got shape {list(shape)}")
    with pytest.raises(EvaluationInputError, match=expected):
        KpsEvaluator(lambda images: torch.ones(shape)).embed_images([noise_picture(0)] * 2)


def test_callable_has_no_text_side() -> None:
    evaluator = KpsEvaluator(mean_colour)
    assert evaluator.name == "mean_colour"
    assert not evaluator.has_text
    with pytest.raises(EvaluationInputError, match="mean_colour: expected one with a text side"):
        evaluator.embed_texts(["a cat"])


def test_unusable_arguments_are_refused(tiny_clip_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match="batch_size: expected at least 1, got 0"):
        KpsEvaluator(mean_colour, batch_size=0)
    with pytest.raises(EvaluationInputError, match="got int"):
        KpsEvaluator(3)  # type: ignore[arg-type]
    with pytest.raises(EvaluationInputError, match="texts: expected at least one"):
        KpsEvaluator(tiny_clip_dir).embed_texts([])
    with pytest.raises(EvaluationFileError, match="expected a CLIP, SigLIP or DINOv2 model with its processor"):
        KpsEvaluator(tmp_path)


def test_a_black_pair_is_named_as_it_would_score_one() -> None:
    black, picture = Image.new("RGB", (8, 8)), noise_picture(0)
    evaluator = KpsEvaluator(mean_colour)
    with pytest.raises(EvaluationInputError, match="only black pixels in at index 1 of base_trigger"):
        evaluator.score([picture] * 2, [picture] * 2, [picture, black], [picture, black])
