"""The dataset as the training loop reads it: latents and prompt embeddings, computed once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cat_rs.training.captions import CaptionPairs
from cat_rs.training.config import TrainConfig
from cat_rs.training.dataset import Crop, Example, crop_square, load_picture
from cat_rs.training.errors import DatasetError
from cat_rs.training.model import Conditioning, default_resolution, encode_caption, encode_pixels, stack


@dataclass(frozen=True)
class View:
    """One square of one picture as the VAE sees it.

    Attributes:
        mean: Mean of the scaled latents, [C, H, W].
        std: Their standard deviation, same shape.
        sizes: SDXL's size conditioning: original height and width, top, left, target height and width; [6].
    """

    mean: torch.Tensor
    std: torch.Tensor
    sizes: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """What one call of the training step takes.

    Attributes:
        latents: Drawn latents, [B, C, H, W]; with a teacher bank, the views' indices in it, [B].
        cond: The embeddings of the captions.
        cond_no_trigger: The embeddings of the captions without the trigger.
    """

    latents: torch.Tensor
    cond: Conditioning
    cond_no_trigger: Conditioning


class EncodedDataset:
    """Views of every picture, and the embeddings of every caption with and without the trigger.

    The mean and standard deviation of the VAE's posterior are kept; latents are drawn anew for each batch.
    """

    def __init__(
        self,
        views: Sequence[Sequence[View]],
        captions: CaptionPairs,
        embeddings: dict[str, Conditioning],
        preserve_share: float = 0.5,
    ) -> None:
        self._views = views
        # The index of each picture's first view among all views.
        self._starts = list(itertools.accumulate(map(len, views), initial=0))
        self._captions = captions
        self._embeddings = embeddings
        self._preserve_share = preserve_share

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._views)

    def batch(
        self,
        pictures: Sequence[int],
        generator: torch.Generator,
        choices: torch.Generator | None = None,
        *,
        from_bank: bool = False,
    ) -> Batch:
        """Draw a view of each picture, and latents of each view unless a teacher bank holds them.

        Args:
            pictures: The indices of the pictures.
            generator: Draws latents, on the device of the views.
            choices: Draws views and prompts, on the CPU: those of a GPU would have to be waited for. By default the
                same generator.
            from_bank: Whether the step has a bank built from `all_views`.
        """
        choices = generator if choices is None else choices
        counts = [len(self._views[picture]) for picture in pictures]
        chosen = [_draw_index(count, choices) if count > 1 else 0 for count in counts]
        views = [self._views[picture][view] for picture, view in zip(pictures, chosen, strict=True)]
        if from_bank:
            latents = torch.tensor([self._starts[p] + view for p, view in zip(pictures, chosen, strict=True)])
        else:
            mean, std = _posterior(views)
            latents = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return Batch(
            latents=latents,
            cond=self._conditioning([self._captions.with_trigger[picture] for picture in pictures], views),
            cond_no_trigger=self._conditioning(
                [self._draw_without_trigger(picture, choices) for picture in pictures], views
            ),
        )

    def _draw_without_trigger(self, picture: int, generator: torch.Generator) -> str:
        """Return the caption without the trigger or, with the chosen probability, another prompt to preserve."""
        preserved = self._captions.preserved
        if preserved and float(torch.rand((), generator=generator)) < self._preserve_share:
            return preserved[_draw_index(len(preserved), generator)]
        return self._captions.without_trigger[picture]

    def all_views(self) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        """Return mean and deviation of the latents of all views, and their conditioning without the trigger."""
        views = [view for views in self._views for view in views]
        captions = [
            caption for caption, views in zip(self._captions.without_trigger, self._views, strict=True) for _ in views
        ]
        return *_posterior(views), self._conditioning(captions, views)

    def _conditioning(self, captions: Sequence[str], views: Sequence[View]) -> Conditioning:
        conditioning = stack([self._embeddings[caption] for caption in captions])
        if "added_cond_kwargs" in conditioning:
            text_embeds = conditioning["added_cond_kwargs"]["text_embeds"]
            time_ids = torch.stack([view.sizes for view in views]).to(text_embeds)
            conditioning["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": time_ids}
        return conditioning


def _draw_index(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _posterior(views: Sequence[View]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([view.mean for view in views]), torch.stack([view.std for view in views])


def encode_dataset(
    pipeline: Any, examples: Iterable[Example], captions: CaptionPairs, config: TrainConfig
) -> EncodedDataset:
    """Run the VAE over every picture and the text encoder over every caption.

    Random crops are drawn from a separate generator, seeded by the settings.

    Args:
        pipeline: A diffusers pipeline from `load_pipeline`.
        examples: The pictures; read once, so that they may come through a progress bar.
        captions: Their captions, with and without the trigger.
        config: The settings: resolution, crops and mirroring.

    Raises:
        DatasetError: A picture is broken, the resolution does not fit the VAE, or the text encoder cuts a trigger off.
    """
    size = config.resolution or default_resolution(pipeline)
    if size % pipeline.vae_scale_factor:
        raise DatasetError(f"resolution: expected a multiple of {pipeline.vae_scale_factor}, got {size}")
    generator = torch.Generator().manual_seed(config.seed)
    views = [_views(pipeline, example, size, config, generator) for example in examples]
    texts = dict.fromkeys((*captions.with_trigger, *captions.without_trigger, *captions.preserved))
    embeddings = {text: encode_caption(pipeline, text) for text in texts}
    if config.preserves():
        _check_triggers_are_encoded(captions, embeddings)
    return EncodedDataset(views, captions, embeddings, config.preserve_share)


def _check_triggers_are_encoded(captions: CaptionPairs, embeddings: dict[str, Conditioning]) -> None:
    """Raise DatasetError if a trigger does not reach the model: the same prompt would be learned and preserved."""
    pairs = zip(captions.with_trigger, captions.without_trigger, strict=True)
    cut = [text for text, other in pairs if text != other and _equal(embeddings[text], embeddings[other])]
    if cut:
        raise DatasetError(
            f"trigger: expected it within what the text encoder reads, got {len(cut)} captions that it encodes as it "
            f"does without the trigger, such as {cut[0]!r}: shorten them, or move the trigger to the front"
        )


def _equal(one: Conditioning, other: Conditioning) -> bool:
    return all(
        _equal(value, other[name]) if isinstance(value, dict) else torch.equal(value, other[name])
        for name, value in one.items()
    )


def _views(pipeline: Any, example: Example, size: int, config: TrainConfig, generator: torch.Generator) -> list[View]:
    picture = load_picture(example.path)
    if config.crop == "center":
        crops = [crop_square(picture, size)]
    else:
        crops = [crop_square(picture, size, generator) for _ in range(config.crops)]
    if config.flip:
        crops += [Crop(crop.pixels.flip(-1), crop.original_size, crop.top_left) for crop in crops]
    return [_view(pipeline, crop, size) for crop in crops]


def _view(pipeline: Any, crop: Crop, size: int) -> View:
    mean, std = encode_pixels(pipeline, crop.pixels)
    sizes = torch.tensor([*crop.original_size, *crop.top_left, size, size], device=mean.device)
    return View(mean, std, sizes)
