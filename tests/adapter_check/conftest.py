"""The tiny pipeline, its encoder and adapters for it."""

from __future__ import annotations

import torch
from PIL import Image

from tests.evaluation.conftest import adapter_dir, counting, pipeline, tiny_clip_dir

__all__ = ["adapter_dir", "counting", "pipeline", "tiny_clip_dir"]


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """An encoder that sees more than a random CLIP does."""
    return torch.stack(
        [torch.tensor(list(image.resize((4, 4)).tobytes()), dtype=torch.float) - 127.5 for image in images]
    )
