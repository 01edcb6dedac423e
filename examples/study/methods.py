"""The methods that the study compares: each trains one adapter and leaves it at several steps.

Those that are settings of cat-rs run its trainer. The others, which peers use, are short loops here, over the same
fused layers and optimizer, so that what differs is the method. All share model, rank, learning rate, batch size and
number of steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cat_rs
import numpy as np
import torch
from cat_rs.training import TrainConfig, train
from concepts import MODEL, PRESERVE_PROMPTS, Concept
from PIL import Image

STEPS = 400
BATCH = 4
RANK = 16
LR = 4e-4
CLASS_PICTURES = 40  # for each concept, as many prompts as captions
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: In tables.
        what: What it is, in a line.
        train: Writes ``step-000400.safetensors`` and so on for the concept, seed and data folder into a folder.
        kept: The steps whose adapters are kept and scored, evenly spaced.
        steps: How long it trains.
    """

    name: str
    what: str
    train: Callable[[Method, Concept, int, Path, Path], None]
    kept: tuple[int, ...] = (STEPS // 2, STEPS)
    steps: int = STEPS


def adapter_file(folder: Path, step: int) -> Path:
    """Where a method leaves the adapter of a step."""
    return folder / f"step-{step:06d}.safetensors"


def with_trainer(method: Method, concept: Concept, seed: int, data: Path, folder: Path, **settings: Any) -> None:
    """What `cat-rs train` does."""
    every = method.kept[0]
    work = folder / "run"
    train(
        TrainConfig(
            model=str(MODEL),
            data=str(data),
            output_dir=str(work),
            rank=RANK,
            target_modules=TARGETS,
            steps=method.steps,
            batch_size=BATCH,
            lr=LR,
            seed=seed,
            checkpoint_every=every,
            keep_checkpoints=method.steps // every,
            tensorboard=False,
            overwrite=True,
            **{"trigger": (f"{concept.trigger}={concept.class_word}",), **settings},
        ),
        progress=False,
        report=lambda _line: None,
    )
    for step in method.kept:
        checkpoint = work / "checkpoints" / f"step-{step:06d}"
        (checkpoint / "pytorch_lora_weights.safetensors").replace(adapter_file(folder, step))
    (work / "metrics.jsonl").replace(folder / "metrics.jsonl")
    shutil.rmtree(work)


class Bench:
    """Model, latents and text embeddings of a training by hand."""

    def __init__(self, concept: Concept, seed: int) -> None:
        from diffusers import StableDiffusionPipeline
        from peft import LoraConfig

        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder):
            part.requires_grad_(False)
        self.scheduler = self.pipeline.scheduler
        self.unet = self.pipeline.unet
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)))
        self.unet.train()
        self.concept = self.encode_pictures([Image.open(file) for file in concept.pictures])
        self.captions = self.encode_prompts(concept.captions)
        self.captions_no_trigger = self.encode_prompts(concept.captions_no_trigger)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text embeddings, [N, L, D]."""
        return self.pipeline.encode_prompt(list(prompts), "cpu", 1, False)[0]

    @torch.no_grad()
    def encode_pictures(self, pictures: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the scaled latents, each [N, C, H, W]."""
        pixels = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in pictures])
        values = torch.from_numpy(pixels / 127.5 - 1.0).permute(0, 3, 1, 2)
        posterior = self.pipeline.vae.encode(values).latent_dist
        scale = self.pipeline.vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def draw(self, pictures: tuple[torch.Tensor, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of some pictures, and latents of them."""
        mean, std = pictures
        chosen = torch.randint(len(mean), (count,), generator=self.generator)
        noise = torch.randn(mean[chosen].shape, generator=self.generator)
        return chosen, mean[chosen] + std[chosen] * noise

    def noised(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, timesteps and target of fresh draws."""
        noise = torch.randn(latents.shape, generator=self.generator)
        length = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(length, (len(latents),), generator=self.generator)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        return noisy, timesteps, self.scheduler.get_velocity(latents, noise, timesteps)

    def step(self, **settings: Any) -> cat_rs.CatStep:
        """A training step of this model."""
        return cat_rs.CatStep(self.unet, self.scheduler, lr=LR, generator=self.generator, **settings)

    def class_pictures(self, concept: Concept, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of pictures that the base model draws for the captions without the trigger, made once."""
        if not file.exists():
            prompts = concept.captions_no_trigger
            with cat_rs.adapter_disabled(self.unet):
                pictures = [
                    picture
                    for seed in range(CLASS_PICTURES // len(prompts))
                    for picture in self.pipeline(
                        list(prompts),
                        num_inference_steps=16,
                        guidance_scale=3.0,
                        generator=[torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))],
                    ).images
                ]
            unfinished = file.with_suffix(f".{torch.initial_seed()}")
            torch.save(self.encode_pictures(pictures), unfinished)
            unfinished.replace(file)
        mean, std = torch.load(file, weights_only=True)
        return mean, std


def by_hand(
    make_advance: Callable[[Bench, Concept, Path], Callable[[], Any]],
    method: Method,
    concept: Concept,
    seed: int,
    data: Path,
    folder: Path,
) -> None:
    """Train with a loop of this file; `make_advance` returns what does one step."""
    bench = Bench(concept, seed)
    advance = make_advance(bench, concept, data)
    folder.mkdir(parents=True, exist_ok=True)
    for step in range(1, method.steps + 1):
        advance()
        if step in method.kept:
            cat_rs.save_lora(adapter_file(folder, step), bench.unet)


def prior_preservation(bench: Bench, concept: Concept, data: Path) -> Callable[[], Any]:
    """DreamBooth (Ruiz et al., arXiv 2208.12242): generated class pictures are learned beside the concept's."""
    pictures = bench.class_pictures(concept, data.with_suffix(".class.pt"))
    step = bench.step(cat_factor=0.0)
    # The mean over both halves times two is the sum of their means: prior_loss_weight 1.
    weight = torch.full((2 * BATCH,), 2.0)

    def advance() -> None:
        chosen, latents = bench.draw(bench.concept, BATCH)
        class_chosen, class_latents = bench.draw(pictures, BATCH)
        class_cond = bench.captions_no_trigger[class_chosen % len(bench.captions)]
        cond = torch.cat([bench.captions[chosen], class_cond])
        step(torch.cat([latents, class_latents]), cond, cond, sample_weight=weight)

    return advance


def separate_samples(bench: Bench, concept: Concept, data: Path) -> Callable[[], Any]:
    """kohya's preservation: base predictions are kept on class pictures, with noise and timesteps of their own."""
    pictures = bench.class_pictures(concept, data.with_suffix(".class.pt"))
    cat_rs.patch_peft(bench.unet)
    trained = [param for param in bench.unet.parameters() if param.requires_grad]
    optimizer = cat_rs.FlatAdamW(trained, LR, max_grad_norm=1.0)

    def advance() -> None:
        chosen, latents = bench.draw(bench.concept, BATCH)
        noisy, timesteps, target = bench.noised(latents)
        class_chosen, class_latents = bench.draw(pictures, BATCH)
        class_noisy, class_timesteps, _ = bench.noised(class_latents)
        class_cond = bench.captions_no_trigger[class_chosen % len(bench.captions)]
        with torch.no_grad(), cat_rs.adapter_disabled(bench.unet):
            base = bench.unet(class_noisy, class_timesteps, class_cond).sample
        student = bench.unet(
            torch.cat([noisy, class_noisy]),
            torch.cat([timesteps, class_timesteps]),
            torch.cat([bench.captions[chosen], class_cond]),
        ).sample
        cat_rs.cat_loss(student[:BATCH], target, student[BATCH:], base).backward()
        optimizer.step()
        optimizer.zero_grad()

    return advance


def blank_prompt(bench: Bench, concept: Concept, data: Path) -> Callable[[], Any]:
    """ai-toolkit's blank-prompt preservation: CAT the empty prompt in place of the captions without the trigger."""
    step = bench.step(cat_factor=1.0)
    blank = bench.encode_prompts([""]).expand(BATCH, -1, -1)

    def advance() -> None:
        chosen, latents = bench.draw(bench.concept, BATCH)
        step(latents, bench.captions[chosen], blank)

    return advance


def _methods() -> dict[str, Method]:
    def cat(factor: float) -> Method:
        what = f"CAT, cat_factor {factor:g}, the captions without the trigger preserved"
        return Method(f"CAT {factor:g}", what, partial(with_trainer, cat_factor=factor))

    every_50 = tuple(range(STEPS // 8, STEPS + 1, STEPS // 8))
    methods = (
        Method("LoRA", "plain LoRA", partial(with_trainer, cat_factor=0.0), every_50),
        Method(
            "prior preservation",
            f"DreamBooth: {CLASS_PICTURES} class pictures of the base model are learned beside the concept's",
            partial(by_hand, prior_preservation),
        ),
        Method(
            "separate samples",
            "as in kohya's scripts: base predictions kept on those class pictures, noise and timesteps drawn apart",
            partial(by_hand, separate_samples),
        ),
        Method(
            "blank prompt",
            "as in ai-toolkit: base predictions kept for the empty prompt, factor 1",
            partial(by_hand, blank_prompt),
        ),
        *map(cat, (0.5, 1.0, 2.0, 6.0)),
        Method(
            "CAT ratio",
            "CAT, cat_factor * L_cat kept at 0.2 of L_diff, cat_factor at most 20",
            partial(with_trainer, cat_factor=20.0, cat_ratio=0.2),
        ),
        Method(
            "CAT bank",
            "CAT, cat_factor 1, base predictions of 64 stored draws a picture",
            partial(with_trainer, cat_factor=1.0, teacher_draws=64),
        ),
        Method(
            "CAT prompts",
            "CAT, cat_factor 1, 206 more prompts preserved in half of the samples",
            partial(with_trainer, cat_factor=1.0, preserve_prompts=str(PRESERVE_PROMPTS)),
        ),
    )
    return {method.name: method for method in methods}


METHODS = _methods()
