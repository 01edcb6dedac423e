"""Encoders of transformers: the embeddings are those of the model's own code, whatever kind it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cat_rs.evaluation import (
    ClipEncoder,
    Dinov2Encoder,
    EvaluationConfig,
    EvaluationFileError,
    EvaluationInputError,
    EvaluationPrompts,
    KpsEvaluator,
    evaluate,
    load_encoder,
)

from .conftest import CLIP_SIZE, noise_picture

TOLERANCE = 1e-5
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# Small, large, wide, high: all are resized, most are cropped.
SIZES = [(20, 16), (24, 24), (64, 48), (31, 90), (200, 200)]


@pytest.fixture(scope="session")
def tiny_dinov2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dinov2Model with random weights and its image processor, in a folder."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=CLIP_SIZE, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    crop = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_siglip_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SiglipModel with random weights and its processor, in a folder; its tokenizer is the tiny pipeline's."""
    from transformers import CLIPTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    torch.manual_seed(6)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline_dir / "tokenizer")
    config = SiglipConfig(
        text_config={**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "projection_size": 16},
        vision_config={**TOWER, "image_size": CLIP_SIZE, "patch_size": 8},
    )
    folder = tmp_path_factory.mktemp("siglip")
    SiglipModel(config).save_pretrained(folder)
    image_processor = SiglipImageProcessor(size={"height": CLIP_SIZE, "width": CLIP_SIZE})
    SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def pictures() -> list[Image.Image]:
    return [noise_picture(number, size) for number, size in enumerate(SIZES)]


def assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(
        torch.nn.functional.normalize(ours, dim=1),
        torch.nn.functional.normalize(reference.float(), dim=1),
        rtol=0,
        atol=TOLERANCE,
    )


def test_clip_pictures_of_any_size_are_those_of_transformers(tiny_clip_dir: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(tiny_clip_dir), CLIPProcessor.from_pretrained(tiny_clip_dir)
    with torch.no_grad():
        # One at a time, as the model's page shows it.
        reference = torch.cat(
            [
                model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output
                for image in pictures()
            ]
        )
    assert_close(KpsEvaluator(tiny_clip_dir, batch_size=3).embed_images(pictures()), reference)


def test_dinov2_is_the_class_token(tiny_dinov2_dir: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    model, processor = AutoModel.from_pretrained(tiny_dinov2_dir), AutoImageProcessor.from_pretrained(tiny_dinov2_dir)
    with torch.no_grad():
        reference = torch.cat(
            [model(**processor(images=image, return_tensors="pt")).last_hidden_state[:, 0] for image in pictures()]
        )
    for source in (tiny_dinov2_dir, str(tiny_dinov2_dir), (model, processor)):
        evaluator = KpsEvaluator(source, batch_size=3)
        assert not evaluator.has_text
        assert_close(evaluator.embed_images(pictures()), reference)


def test_siglip_pictures_and_texts_are_those_of_transformers(tiny_siglip_dir: Path) -> None:
    from transformers import SiglipModel, SiglipProcessor

    model, processor = SiglipModel.from_pretrained(tiny_siglip_dir), SiglipProcessor.from_pretrained(tiny_siglip_dir)
    texts = ["a cat", "a red background", "x"]
    with torch.no_grad():
        inputs = processor(
            text=texts, images=pictures(), padding="max_length", max_length=40, truncation=True, return_tensors="pt"
        )
        output = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    evaluator = KpsEvaluator(tiny_siglip_dir, batch_size=2)
    assert_close(evaluator.embed_images(pictures()), output.image_embeds)
    assert_close(evaluator.embed_texts(texts), output.text_embeds)


def test_half_precision_file_is_computed_in_float32(tiny_clip_dir: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder = shutil.copytree(tiny_clip_dir, tmp_path / "clip")
    model = CLIPModel.from_pretrained(folder).half()
    model.save_pretrained(folder)
    assert_close(
        KpsEvaluator(folder).embed_images(pictures()),
        KpsEvaluator((model.float(), ClipEncoder.from_pretrained(folder)._processor)).embed_images(pictures()),
    )


def test_fingerprints_tell_encoders_apart(
    tiny_clip_dir: Path, tiny_dinov2_dir: Path, tiny_siglip_dir: Path, tmp_path: Path
) -> None:
    encoders = [load_encoder(folder) for folder in (tiny_clip_dir, tiny_dinov2_dir, tiny_siglip_dir)]
    prints = [encoder.fingerprint() for encoder in encoders]
    copy = shutil.copytree(tiny_clip_dir, tmp_path / "copy")
    encoders[0].encode_images(pictures())
    encoders[0].encode_texts(["a cat"])
    assert encoders[0].fingerprint() == load_encoder(copy).fingerprint() == prints[0]
    other = load_encoder(tiny_clip_dir)
    other._processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert len({*prints, other.fingerprint()}) == 4
    assert KpsEvaluator(lambda images: torch.ones(len(images), 2)).fingerprint() is None


def test_encoder_of_ones_own_may_have_a_fingerprint() -> None:
    class Own:
        name, has_text = "own", False

        def encode_images(self, images: Any) -> torch.Tensor:
            return torch.ones(len(images), 2)

    assert KpsEvaluator(Own()).fingerprint() is None
    Own.fingerprint = lambda self: "own 1"
    assert KpsEvaluator(Own()).fingerprint() == "own 1"


def test_evaluation_with_dinov2_has_no_prompt_similarity(
    pipeline: Any,
    adapter_dir: Path,
    tiny_dinov2_dir: Path,
    prompts: EvaluationPrompts,
    config: EvaluationConfig,
    concept_images: list[Image.Image],
    tmp_path: Path,
) -> None:
    result = evaluate(
        pipeline,
        {"mine": adapter_dir},
        prompts,
        tiny_dinov2_dir,
        concept_images=concept_images,
        config=config,
        cache=tmp_path,
        progress=False,
    )
    scores = result.adapters["mine"]
    assert scores.prompt_similarity is scores.prompt_similarity_no_trigger is None
    assert scores.kps is not None
    assert scores.identity is not None
    assert len(list((tmp_path / "embeddings").iterdir())) == 8


def test_unusable_models_are_named(tiny_pipeline_dir: Path, tiny_dinov2_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationInputError, match=r"of the kind clip, siglip, dinov2, .*, got clip_text_model in"):
        load_encoder(tiny_pipeline_dir / "text_encoder")
    with pytest.raises(EvaluationInputError, match=r"of the kind clip, .*, got Linear"):
        KpsEvaluator((torch.nn.Linear(1, 1), None))
    with pytest.raises(EvaluationInputError, match=r"with a text side in .*, got dinov2"):
        ClipEncoder.from_pretrained(tiny_dinov2_dir)
    with pytest.raises(EvaluationInputError, match="expected one with a text side, got DINOv2"):
        load_encoder(tiny_dinov2_dir).encode_texts(["a cat"])
    assert isinstance(load_encoder(tiny_dinov2_dir), Dinov2Encoder)
    without_processor = shutil.copytree(tiny_dinov2_dir, tmp_path / "dino")
    (without_processor / "preprocessor_config.json").unlink()
    with pytest.raises(EvaluationFileError, match="expected a CLIP, SigLIP or DINOv2 model with its processor, got"):
        load_encoder(without_processor)


@pytest.mark.parametrize("encoder", ["tiny_clip_dir", "tiny_dinov2_dir"])
@pytest.mark.parametrize("size", [(8, 400), (400, 8)])
def test_a_thin_picture_is_seen_as_a_whole_one(
    encoder: str, size: tuple[int, int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(request.getfixturevalue(encoder))
    embedded = encoder.encode_images([noise_picture(0, size)])
    monkeypatch.setattr("cat_rs.evaluation.encoder._LONGEST_OF_SHORT", 10**6)
    torch.testing.assert_close(embedded, encoder.encode_images([noise_picture(0, size)]), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("encoder", ["tiny_clip_dir", "tiny_dinov2_dir", "tiny_siglip_dir"])
def test_a_thin_picture_does_not_fill_the_memory(encoder: str, request: pytest.FixtureRequest) -> None:
    encoder = load_encoder(request.getfixturevalue(encoder))
    pictures = [Image.new("RGB", size, "red") for size in ((1, 10_000_000), (10_000_000, 1))]
    # A picture of this shape, scaled whole, would take 8 GB and more.
    assert len(encoder.encode_images(pictures)) == 2
