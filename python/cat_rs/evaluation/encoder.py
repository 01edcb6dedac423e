"""Image and text embeddings from a transformers CLIP or SigLIP; image embeddings from DINOv2 or any callable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from PIL import Image

from cat_rs import hub
from cat_rs.evaluation.errors import EvaluationFileError, EvaluationInputError
from cat_rs.evaluation.fingerprint import canonical_json, fingerprint, installed_versions

ImageEncoder: TypeAlias = Callable[[list[Image.Image]], torch.Tensor]
"""Takes RGB PIL images, returns embeddings [N, D]."""

EncoderSource: TypeAlias = "str | os.PathLike[str] | tuple[Any, Any] | ImageEncoder | Encoder"
"""A folder or hub name of a CLIP, SigLIP or DINOv2 model, the pair (model, processor), or a callable."""

_LONGEST_OF_SHORT = 16


class Encoder(Protocol):
    """What the evaluation needs of an encoder. The caller makes the batches.

    An evaluation's cache keeps the embeddings of an encoder that also has `fingerprint() -> str`, a text that changes
    whenever its embeddings do.
    """

    name: str
    has_text: bool

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed one batch of RGB pictures to [N, D]."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed one batch of texts to [N, D], in the space of the pictures."""


class TransformersEncoder:
    """A transformers model whose own processor prepares pictures and texts.

    Args:
        model: The model; the encoder puts it into evaluation mode, and moves it if a device is given.
        processor: Its processor.
        device: Where to run; where the model is if None.
        name: What reports call this encoder.
    """

    def __init__(self, model: Any, processor: Any, *, device: torch.device | str | None = None, name: str):
        self.name = name
        self._model = (model if device is None else model.to(device)).eval()
        self._processor = processor

    def fingerprint(self) -> str:
        """Return a hash of everything that determines the embeddings."""
        return fingerprint(
            {
                "model": self._model,
                "image_processor": getattr(self._processor, "image_processor", self._processor),
                "tokenizer": getattr(self._processor, "tokenizer", None),
                "device": self._model.device.type,
                "versions": canonical_json(installed_versions("transformers", "pillow")),
            }
        )

    def _pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        preparation = getattr(self._processor, "image_processor", self._processor)
        if getattr(preparation, "do_center_crop", False):
            images = [_middle(image) for image in images]
        inputs = self._processor(images=list(images), return_tensors="pt")
        pixels: torch.Tensor = inputs["pixel_values"].to(self._model.device, self._model.dtype)
        return pixels


def _middle(image: Image.Image) -> Image.Image:
    """Cut the ends off a long and thin picture: scaled whole it could fill the memory, and only its middle is seen."""
    longest = _LONGEST_OF_SHORT * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


class ClipEncoder(TransformersEncoder):
    """A CLIPModel or a SiglipModel with its processor: pictures and texts in one space."""

    has_text = True

    def __init__(self, model: Any, processor: Any, *, device: torch.device | str | None = None, name: str = "CLIP"):
        super().__init__(model, processor, device=device, name=name)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> ClipEncoder:
        """Load such a model and its processor from a folder or hub name; the model computes in float32."""
        encoder = load_encoder(path, device=device)
        if not isinstance(encoder, cls):
            raise EvaluationInputError(f"encoder: expected a model with a text side in {path}, got {encoder.name}")
        return encoder

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed one batch of RGB pictures to [N, D]."""
        return _features(self._model.get_image_features(pixel_values=self._pixels(images)))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed one batch of texts to [N, D]; longer texts are cut at the model's length."""
        # SigLIP was trained on texts padded to its full length, without a mask.
        whole_length = self._model.config.model_type == "siglip"
        inputs = self._processor(
            text=list(texts),
            padding="max_length" if whole_length else True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        tokens = inputs.to(self._model.device)
        mask = {} if whole_length else {"attention_mask": tokens["attention_mask"]}
        return _features(self._model.get_text_features(input_ids=tokens["input_ids"], **mask))


class Dinov2Encoder(TransformersEncoder):
    """A Dinov2Model with its image processor: the class token after the last layer norm. It has no text side."""

    has_text = False

    def __init__(self, model: Any, processor: Any, *, device: torch.device | str | None = None, name: str = "DINOv2"):
        super().__init__(model, processor, device=device, name=name)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed one batch of RGB pictures to [N, D]."""
        return _features(self._model(pixel_values=self._pixels(images)))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Raise EvaluationInputError: DINOv2 has no text side."""
        raise EvaluationInputError(f"encoder {self.name}: expected one with a text side, got DINOv2")


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


def load_encoder(
    path: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> ClipEncoder | Dinov2Encoder:
    """Load a CLIP, SigLIP or DINOv2 model with its processor; the model's own configuration says which it is.

    The model computes in float32 even if its file holds float16, so that rounding does not pass for drift.

    Args:
        path: A folder or a hub name.
        device: Where to run; the CPU if None.

    Raises:
        EvaluationFileError: There is no such model.
        EvaluationInputError: The model is of another kind.
    """
    import transformers

    refusal = hub.refusal(path)
    from_cache = {"local_files_only": refusal is not None}
    try:
        kind = transformers.AutoConfig.from_pretrained(path, **from_cache).model_type
        if kind in _MODELS:
            encoder_class, model_class, processor_class = _MODELS[kind]
            model = getattr(transformers, model_class).from_pretrained(path, **from_cache).float()
            processor = getattr(transformers, processor_class).from_pretrained(path, **from_cache)
    except (OSError, ValueError) as error:
        raise EvaluationFileError(
            f"encoder: expected a CLIP, SigLIP or DINOv2 model with its processor, got {path}: {refusal or error}"
        ) from error
    if kind not in _MODELS:
        raise EvaluationInputError(f"encoder: expected a model of the kind {', '.join(_MODELS)}, got {kind} in {path}")
    return encoder_class(model, processor, device=device, name=Path(path).name)


def make_encoder(source: EncoderSource, *, device: torch.device | str | None = None) -> Encoder:
    """Make an encoder from a folder, the pair (model, processor), or a callable.

    Args:
        source: See `EncoderSource`; an `Encoder` is returned as it is.
        device: Where to run a model; a callable chooses for itself.
    """
    if isinstance(source, (str, os.PathLike)):
        return load_encoder(source, device=device)
    if isinstance(source, tuple) and len(source) == 2:
        model, processor = source
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in _MODELS:
            raise EvaluationInputError(f"encoder: expected a model of the kind {', '.join(_MODELS)}, got {kind}")
        return _MODELS[kind][0](model, processor, device=device, name=type(model).__name__)
    if hasattr(source, "encode_images"):
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


# The model_type of a configuration -> our class, and those of transformers for the model and its processor.
_MODELS: dict[str, tuple[type[ClipEncoder] | type[Dinov2Encoder], str, str]] = {
    "clip": (ClipEncoder, "CLIPModel", "CLIPProcessor"),
    "siglip": (ClipEncoder, "SiglipModel", "SiglipProcessor"),
    "dinov2": (Dinov2Encoder, "Dinov2Model", "AutoImageProcessor"),
    "dinov2_with_registers": (Dinov2Encoder, "Dinov2WithRegistersModel", "AutoImageProcessor"),
}


def _features(output: Any) -> torch.Tensor:
    """Return the embedding: an output's `pooler_output`; of CLIP and SigLIP a tensor in transformers 4."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
