"""Image and text embeddings from a transformers CLIP, or image embeddings from any callable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from PIL import Image

from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError

ImageEncoder: TypeAlias = Callable[[list[Image.Image]], torch.Tensor]
"""Takes RGB PIL images, returns embeddings [N, D]."""

EncoderSource: TypeAlias = "str | os.PathLike[str] | tuple[Any, Any] | ImageEncoder | Encoder"
"""A folder or hub name of a CLIPModel with its CLIPProcessor, the pair (model, processor), or a callable."""


class Encoder(Protocol):
    """What the evaluation needs of an encoder. Batches are made by the caller."""

    name: str
    has_text: bool

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed one batch of RGB pictures to [N, D]."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed one batch of texts to [N, D], in the space of the pictures."""


class ClipEncoder:
    """A transformers CLIPModel; pictures and texts are prepared by its own CLIPProcessor.

    Args:
        model: The model; it is put into evaluation mode, and moved if a device is given.
        processor: Its processor.
        device: Where to run; where the model is if None.
        name: What reports call this encoder.
    """

    has_text = True

    def __init__(self, model: Any, processor: Any, *, device: torch.device | str | None = None, name: str = "CLIP"):
        self.name = name
        self._model = (model if device is None else model.to(device)).eval()
        self._processor = processor

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> ClipEncoder:
        """Load a folder (or hub name) that holds a CLIPModel and its CLIPProcessor."""
        from transformers import CLIPModel, CLIPProcessor

        try:
            model = CLIPModel.from_pretrained(path)
            processor = CLIPProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise EvaluationFileError(
                f"encoder: expected a CLIPModel with its processor in {path}: {error}"
            ) from error
        return cls(model, processor, device=device, name=Path(path).name)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed one batch of RGB pictures to [N, D]."""
        inputs = self._processor(images=list(images), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self._model.device, self._model.dtype)
        return _features(self._model.get_image_features(pixel_values=pixels))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed one batch of texts to [N, D]; texts beyond the model's length are cut."""
        inputs = self._processor(
            text=list(texts),
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        tokens = inputs.to(self._model.device)
        return _features(
            self._model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        )


class CallableEncoder:
    """Any function from RGB pictures to embeddings; it has no text side."""

    has_text = False

    def __init__(self, function: ImageEncoder):
        self.name = getattr(function, "__name__", type(function).__name__)
        self._function = function

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed one batch of RGB pictures to [N, D]."""
        embeddings = torch.as_tensor(self._function(list(images)))
        if embeddings.ndim != 2 or len(embeddings) != len(images):
            raise EvaluationInputError(
                f"encoder {self.name}: expected embeddings [{len(images)}, D], got shape {list(embeddings.shape)}"
            )
        return embeddings

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Raise EvaluationInputError: a callable has no text side."""
        raise EvaluationInputError(f"encoder {self.name}: expected one with a text side, got a function of pictures")


def make_encoder(source: EncoderSource, *, device: torch.device | str | None = None) -> Encoder:
    """Make an encoder of a folder, of the pair (model, processor), or of a callable.

    Args:
        source: See `EncoderSource`; an `Encoder` is returned as it is.
        device: Where to run a model. A callable runs where it likes.
    """
    if isinstance(source, (str, os.PathLike)):
        return ClipEncoder.from_pretrained(source, device=device)
    if isinstance(source, tuple) and len(source) == 2:
        return ClipEncoder(*source, device=device, name=type(source[0]).__name__)
    if isinstance(source, (ClipEncoder, CallableEncoder)) or hasattr(source, "encode_images"):
        return source  # type: ignore[return-value]
    if callable(source):
        return CallableEncoder(source)
    raise EvaluationInputError(
        f"encoder: expected a folder, (model, processor) or a callable, got {type(source).__name__}"
    )


def embed_in_batches(
    encode: Callable[[Sequence[Any]], torch.Tensor], items: Sequence[Any], batch_size: int
) -> torch.Tensor:
    """Embed `items` a batch at a time; returns [N, D] in float32 on the CPU."""
    parts: Iterable[torch.Tensor] = (
        encode(items[start : start + batch_size]) for start in range(0, len(items), batch_size)
    )
    return torch.cat([part.to("cpu", torch.float32) for part in parts])


def check_embeddings(embeddings: torch.Tensor, names: Sequence[str], what: str) -> None:
    """Raise if an embedding is not finite or zero: its cosine would be NaN.

    Args:
        embeddings: [N, D].
        names: What to call each row in the error.
        what: "picture" or "text".
    """
    norms = torch.linalg.vector_norm(embeddings.double(), dim=1)
    usable = norms.isfinite() & (norms > 0)
    if bool(usable.all()):
        return
    index = int((~usable).nonzero()[0])
    found = "a zero vector" if norms[index] == 0 else "a vector with NaN or infinite values"
    raise EvaluationInputError(f"encoder: expected a finite, non-zero embedding of {what} {names[index]}, got {found}")


def _features(output: Any) -> torch.Tensor:
    """Return the projected embedding: a tensor in transformers 4, an output's `pooler_output` in 5."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
