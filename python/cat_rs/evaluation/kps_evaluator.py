"""Knowledge Preservation Score of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cat_rs.arguments import shown
from cat_rs.evaluation.encoder import EncoderSource, check_embeddings, embed_in_batches, make_encoder
from cat_rs.evaluation.errors import EvaluationInputError
from cat_rs.evaluation.pictures import Pictures, PictureSource, check_same_sizes, load_pictures
from cat_rs.preservation_score import KpsResult, kps


class KpsEvaluator:
    """Embeds pictures and scores how much of the base model an adapter preserved.

    With e the image embedding and s(a, b) = (1 + cos(e_a, e_b)) / 2 for a picture a of the base model and the
    picture b of the adapted model for the same prompt, seed and sampler:

        UPS = harmonic mean of s over prompts without the trigger
        TPS = harmonic mean of s over prompts with the trigger
        KPS = harmonic mean of TPS and UPS

    This is this project's reading of the score: the paper (arXiv 2404.07554) describes it in words, and its code
    publishes only s. A model that learned nothing has KPS 1: read KPS beside identity similarity.

    Args:
        encoder: A folder or hub name of a transformers CLIP, SigLIP or DINOv2 model with its processor, the pair
            (model, processor), or a callable that takes a list of RGB PIL images and returns embeddings [N, D].
        batch_size: Pictures or texts embedded together.
        device: Where the encoder runs; where its model is if None.

    Examples:
        >>> evaluator = cat_rs.KpsEvaluator("openai/clip-vit-base-patch32")  # doctest: +SKIP
        >>> evaluator.score("base/plain", "adapted/plain", "base/trigger", "adapted/trigger").ups  # doctest: +SKIP
        0.97
    """

    def __init__(
        self, encoder: EncoderSource, *, batch_size: int = 32, device: torch.device | str | None = None
    ) -> None:
        if not (isinstance(batch_size, int | np.integer) and batch_size >= 1):
            raise EvaluationInputError(f"batch_size: expected at least 1, got {shown(batch_size)}")
        self.batch_size = batch_size
        self._encoder = make_encoder(encoder, device=device)

    @property
    def name(self) -> str:
        """The encoder's name, for reports."""
        return self._encoder.name

    @property
    def has_text(self) -> bool:
        """Whether `embed_texts` works."""
        return self._encoder.has_text

    def fingerprint(self) -> str | None:
        """Return a hash of the encoder's content; None where it has none, as a callable."""
        # An encoder that follows the protocol may lack it.
        of_encoder = getattr(self._encoder, "fingerprint", None)
        return None if of_encoder is None else of_encoder()

    def embed_images(self, images: PictureSource | Pictures) -> torch.Tensor:
        """Embed pictures.

        Args:
            images: A folder, a list of PIL images, or a tensor [N, 3, H, W] with values in [0, 1].

        Returns:
            Embeddings [N, D], float32 on the CPU, not normalized.

        Raises:
            EvaluationInputError: There is no picture, or an embedding is zero or not finite; names the picture.
            EvaluationFileError: A picture cannot be read.
        """
        pictures = load_pictures(images)
        embeddings = embed_in_batches(self._encoder.encode_images, pictures.images, self.batch_size)
        check_embeddings(embeddings, pictures.names, "picture")
        return embeddings

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts in the space of the pictures; [N, D], float32 on the CPU."""
        if not (isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)):
            raise EvaluationInputError(f"texts: expected a sequence of texts, got {shown(texts)}")
        if not texts:
            raise EvaluationInputError("texts: expected at least one, got none")
        embeddings = embed_in_batches(self._encoder.encode_texts, list(texts), self.batch_size)
        check_embeddings(embeddings, [repr(text) for text in texts], "text")
        return embeddings

    def score(
        self,
        base_no_trigger: PictureSource,
        adapted_no_trigger: PictureSource,
        base_trigger: PictureSource,
        adapted_trigger: PictureSource,
        *,
        clusters: tuple[Any, Any] = (None, None),
    ) -> KpsResult:
        """Score pictures in pairs: picture i of the base model with picture i of the adapted model.

        Args:
            base_no_trigger: The base model's pictures for prompts without the trigger.
            adapted_no_trigger: The adapted model's, for the same prompts and seeds.
            base_trigger: The base model's pictures for prompts with the trigger.
            adapted_trigger: The adapted model's.
            clusters: Of the pairs without and with the trigger: see :func:`cat_rs.kps`. The number of each picture's
                prompt, where prompts have several pictures.

        Returns:
            KPS, UPS and TPS, each with an interval.

        Raises:
            EvaluationInputError: The two sides of a pair differ in number or size, are both black, or a picture
                cannot be embedded.
        """
        no_trigger = self._embed_pair("no_trigger", base_no_trigger, adapted_no_trigger)
        trigger = self._embed_pair("trigger", base_trigger, adapted_trigger)
        return kps(*no_trigger, *trigger, clusters=clusters)

    def _embed_pair(self, name: str, base: PictureSource, adapted: PictureSource) -> tuple[torch.Tensor, torch.Tensor]:
        base_pictures, adapted_pictures = load_pictures(base), load_pictures(adapted)
        if len(base_pictures) != len(adapted_pictures):
            raise EvaluationInputError(
                f"score: expected as many pictures in base_{name} as in adapted_{name}, "
                f"got {len(base_pictures)} and {len(adapted_pictures)}"
            )
        check_same_sizes(_labelled(base_pictures, f"base_{name}"), _labelled(adapted_pictures, f"adapted_{name}"))
        for index, pair in enumerate(zip(base_pictures.images, adapted_pictures.images, strict=True)):
            if not any(image.getbbox() for image in pair):
                raise EvaluationInputError(
                    f"score: expected pictures, got only black pixels in {base_pictures.names[index]} of base_{name} "
                    f"and {adapted_pictures.names[index]} of adapted_{name}, as a safety checker leaves them"
                )
        return self.embed_images(base_pictures), self.embed_images(adapted_pictures)


def _labelled(pictures: Pictures, argument: str) -> Pictures:
    return Pictures(pictures.images, tuple(f"the picture {name} of {argument}" for name in pictures.names))
