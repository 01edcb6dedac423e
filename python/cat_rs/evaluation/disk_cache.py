"""A cache of pictures and embeddings on disk: each batch under the hash of everything that determines it."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image

from cat_rs.adapter_file.disk import write_safetensors
from cat_rs.evaluation.config import EvaluationConfig
from cat_rs.evaluation.errors import EvaluationFileError
from cat_rs.evaluation.fingerprint import (
    canonical_json,
    installed_versions,
    pipeline_fingerprint,
    tensors_hash,
    text_hash,
)
from cat_rs.evaluation.generation import PictureBatch, PictureRequest, ScaledAdapter, adapter_files
from cat_rs.image_files import png_bytes

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]

_HASH = "sha256"
_LATENTS = "latents"
_EMBEDDINGS = "embeddings"


class Store(Generic[T]):
    """Items in a folder, each in a safetensors file named by the hash of its key.

    A file holds the SHA-256 of its key and content; a file that is cut short or changed counts as absent, with a
    warning. Files appear whole. Processes may share the folder.

    Args:
        folder: Where the files are.
        pack: Turns an item into named tensors.
        unpack: Turns them back.

    Raises:
        EvaluationFileError: The folder cannot be made, read or written.
    """

    def __init__(self, folder: Path, pack: Callable[[T], Tensors], unpack: Callable[[Tensors], T]) -> None:
        self.folder = folder
        self._pack = pack
        self._unpack = unpack
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationFileError(f"cache: cannot make the folder {folder}: {error}") from error

    def path(self, key: str) -> Path:
        """Return where the item of a key is, or would be."""
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def read(self, key: str) -> T | None:
        """Return the item; None if it is absent or broken."""
        from safetensors.torch import load

        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EvaluationFileError(f"cache: cannot read {path}: {error}") from error
        try:
            tensors = load(data)
            written = bytes(tensors.pop(_HASH).tolist()).decode()
            if written != _item_hash(key, tensors):
                raise ValueError("its content is not what was written")
            return self._unpack(tensors)
        except Exception as error:
            # safetensors, Pillow and Python each have errors of their own for a damaged file.
            warnings.warn(f"cache: {path} is broken and is made anew: {error}", stacklevel=2)
            return None

    def write(self, key: str, item: T) -> None:
        """Write the item, whole or not at all."""
        path, tensors = self.path(key), self._pack(item)
        tensors[_HASH] = _bytes(_item_hash(key, tensors).encode())
        try:
            write_safetensors(path, tensors, {"key": key})
        except OSError as error:
            raise EvaluationFileError(f"cache: cannot write {path}: {error}") from error


class EvaluationCache:
    """The pictures of a pipeline, and their embeddings.

    The key of a batch of pictures is the fingerprint of the pipeline, the SHA-256 of the adapters' files, their
    scales, the prompts, their indices and the seeds, the sampler settings, the type of device, and the versions of the
    libraries. The key of its embeddings is the key of the batch and the fingerprint of the encoder. Keys contain no
    paths.

    Args:
        folder: Where the cache is; created if it does not exist.
        pipeline: The pipeline, without an adapter.
        config: The sampler settings.

    Raises:
        EvaluationFileError: The folder cannot be made.
        EvaluationInputError: A part of the pipeline has no fingerprint.
    """

    def __init__(self, folder: str | os.PathLike[str], pipeline: Any, config: EvaluationConfig) -> None:
        self.pictures = Store[PictureBatch](Path(folder, "pictures"), _pack_pictures, _unpack_pictures)
        self.embeddings = Store[torch.Tensor](
            Path(folder, "embeddings"), lambda item: {_EMBEDDINGS: item}, lambda tensors: tensors[_EMBEDDINGS]
        )
        sampling = asdict(config)
        for part_of_requests in ("seeds", "batch_size"):
            del sampling[part_of_requests]
        self._common = {
            "pipeline": pipeline_fingerprint(pipeline),
            "sampling": sampling,
            "device": torch.device(pipeline.device).type,
            "versions": installed_versions("diffusers", "transformers", "peft"),
        }
        self._adapters: dict[str, str] = {}

    def picture_key(self, adapters: Sequence[ScaledAdapter], requests: tuple[PictureRequest, ...]) -> str:
        """Return the key of a batch of the model that these adapters make."""
        hashes = [(self._adapter_hash(path), scale) for path, scale in adapters]
        # A single one as it is has the key that it had before there were scales.
        adapter = hashes[0][0] if [scale for _, scale in hashes] == [1.0] else hashes or None
        return canonical_json(
            {
                **self._common,
                "adapter": adapter,
                "pictures": [[request.prompt, request.prompt_index, request.seed] for request in requests],
            }
        )

    def embedding_key(self, picture_key: str, encoder: str, batch_size: int) -> str:
        """Return the key of a batch's embeddings by an encoder that computes `batch_size` of them together."""
        content = {"pictures": text_hash(picture_key), "encoder": encoder, "batch_size": batch_size}
        return canonical_json(content)

    def _adapter_hash(self, adapter: str | os.PathLike[str]) -> str:
        path = os.fspath(adapter)
        if path not in self._adapters:
            files = adapter_files(path)
            hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
            self._adapters[path] = text_hash(hashes)
        return self._adapters[path]


def _item_hash(key: str, tensors: Tensors) -> str:
    return text_hash([key, tensors_hash(tensors)])


def _pack_pictures(batch: PictureBatch) -> Tensors:
    pictures = {f"{number}.png": _bytes(png_bytes(image)) for number, image in enumerate(batch.images)}
    return {_LATENTS: batch.latents.contiguous(), **pictures}


def _unpack_pictures(tensors: Tensors) -> PictureBatch:
    latents = tensors.pop(_LATENTS)
    files = (io.BytesIO(tensors[f"{number}.png"].numpy().tobytes()) for number in range(len(tensors)))
    return PictureBatch(tuple(Image.open(file).copy() for file in files), latents)


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
