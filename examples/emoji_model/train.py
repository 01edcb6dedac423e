"""Trains the emoji model from scratch, one stage at a time.

    python examples/emoji_model/train.py clip --minutes 25
    python examples/emoji_model/train.py vae --minutes 35
    python examples/emoji_model/train.py unet --minutes 70

`clip` and `vae` do not depend on each other; `unet` needs both. A stage writes a checkpoint to the work
folder every two minutes and continues from it when started again. `--minutes` is the whole wall time of
the stage, over all starts, and sets the learning-rate schedule; a pause counts.

Several processes of one thread each use busy cores far better than one process of several threads:

    torchrun --nproc-per-node 2 examples/emoji_model/train.py unet --minutes 70

`--start-from examples/emoji_model/model/unet` begins with finished weights instead of random ones.
"""

import argparse
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import (
    COLOURS,
    PictureSampler,
    all_captions,
    drawn_emoji,
    random_caption,
    render,
    to_tensor,
)
from models import build_clip, build_scheduler, build_tokenizer, build_unet, build_vae
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

WORK_DIR = Path(__file__).parent / "work"
CHECKPOINT_SECONDS = 120
LATENT_AUGMENTATIONS = 8
CAPTION_DROP = 0.10


def save_atomically(value: object, path: Path) -> None:
    """Writes beside the file, then renames, so that a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def load_averaged(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Loads the averaged weights of a checkpoint into the model and freezes it."""
    model.load_state_dict(torch.load(path, map_location="cpu")["averaged"])
    return model.eval().requires_grad_(False)


def initial(model: torch.nn.Module, folder: Path | None) -> torch.nn.Module:
    """The model, with the weights saved in the folder if one is given."""
    if folder is not None:
        model.load_state_dict(type(model).from_pretrained(folder, torch_dtype=torch.float32).state_dict())
    return model


def moving_average(decay: float) -> Callable:
    """Exponential moving average that starts short, so that the first steps do not linger in it."""

    @torch.no_grad()
    def update(averages: list[torch.Tensor], values: list[torch.Tensor], count: torch.Tensor) -> None:
        current = min(decay, (1 + count.item()) / (20 + count.item()))
        torch._foreach_lerp_(averages, values, 1 - current)

    return update


class Trainer:
    """AdamW with warm-up and a cosine over wall time, an average of the weights, and checkpoints.

    Args:
        model: the model to train; parameters without gradient are left out.
        compute_loss: returns the loss of a fresh batch, and figures to show.
        path: checkpoint file; training continues from it when it exists.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        compute_loss: Callable[[], tuple[torch.Tensor, dict[str, float]]],
        path: Path,
        minutes: float,
        batch_size: int,
        learning_rate: float,
        warmup_steps: int = 150,
        ema_decay: float = 0.99,
        weight_decay: float = 0.01,
    ):
        self.model, self.compute_loss, self.path = model, compute_loss, path
        self.seconds, self.batch_size = 60 * minutes, batch_size
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.processes, self.is_main = 1, True
        if dist.is_initialized():
            self.processes, self.is_main = dist.get_world_size(), dist.get_rank() == 0
            for parameter in model.parameters():
                dist.broadcast(parameter.data, 0)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.averaged = AveragedModel(model, multi_avg_fn=moving_average(ema_decay))
        self.step, self.samples, self.elapsed = 0, 0, 0.0
        if path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.averaged.module.load_state_dict(state["averaged"])
        self.averaged.n_averaged.fill_(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.samples, self.elapsed = state["step"], state["samples"], state["elapsed"]

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "elapsed": self.elapsed,
        }
        save_atomically(state, self.path)

    def _synchronize(self) -> None:
        """Averages gradients and agrees on the time between the processes of a torchrun."""
        gradients = [parameter.grad for parameter in self.parameters]
        elapsed = torch.tensor([self.elapsed])
        flat = torch.cat([elapsed, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        elapsed, *averages = flat.split([1, *(gradient.numel() for gradient in gradients)])
        self.elapsed = elapsed.item()
        for gradient, average in zip(gradients, averages, strict=True):
            gradient.copy_(average.view_as(gradient))

    def _scheduled_learning_rate(self) -> float:
        warmup = min(1.0, (self.step + 1) / self.warmup_steps)
        progress = min(1.0, self.elapsed / self.seconds)
        return self.learning_rate * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def run(self) -> torch.nn.Module:
        """Trains until the time is over and returns the averaged model, frozen."""
        self.model.train()
        saved = last = time.monotonic()
        with tqdm(
            total=round(self.seconds),
            initial=round(self.elapsed),
            unit="s",
            mininterval=20,
            disable=not self.is_main,
        ) as bar:
            while self.elapsed < self.seconds:
                for group in self.optimizer.param_groups:
                    group["lr"] = self._scheduled_learning_rate()
                loss, figures = self.compute_loss()
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if dist.is_initialized():
                    self._synchronize()
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.averaged.update_parameters(self.model)
                self.step += 1
                self.samples += self.batch_size * self.processes
                now = time.monotonic()
                self.elapsed += now - last
                last = now
                bar.set_postfix(step=self.step, **figures, refresh=False)
                bar.update(round(self.elapsed) - bar.n)
                if self.is_main and now - saved > CHECKPOINT_SECONDS:
                    self._save()
                    saved = now
        if self.is_main:
            self._save()
        return self.averaged.module.eval().requires_grad_(False)


def tokenize(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, length), padded to the tokenizer's full length as the pipeline does."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_clip(args: argparse.Namespace) -> None:
    """Contrastive loss in both directions; pictures with equal captions share the target."""
    tokenizer = build_tokenizer()
    model = initial(build_clip(tokenizer), args.start_from)
    batch_size = 128
    sampler = PictureSampler(other_share=0.3, seed=time.time_ns())
    running = {"loss": 0.0}

    def compute_loss():
        pictures, captions = sampler.batch(batch_size)
        output = model(input_ids=tokenize(tokenizer, captions), pixel_values=pictures)
        numbers = {text: number for number, text in enumerate(dict.fromkeys(captions))}
        ids = torch.tensor([numbers[text] for text in captions])
        target = (ids[:, None] == ids[None, :]).float()
        target /= target.sum(1, keepdim=True)
        loss = (F.cross_entropy(output.logits_per_image, target) + F.cross_entropy(output.logits_per_text, target)) / 2
        running["loss"] += 0.02 * (loss.item() - running["loss"])
        return loss, running

    Trainer(model, compute_loss, args.work_dir / "clip.pt", args.minutes, batch_size, 1.5e-3).run()


def train_vae(args: argparse.Namespace) -> None:
    """Reconstruction loss L1 + 2 MSE and a small KL term."""
    model = initial(build_vae(), args.start_from).to(memory_format=torch.channels_last)
    batch_size = 4
    sampler = PictureSampler(other_share=0.3, seed=time.time_ns(), flip=True)
    running = {"mse": 0.02, "psnr": 0.0, "kl": 0.0}

    def compute_loss():
        pictures, _ = sampler.batch(batch_size)
        posterior = model.encode(pictures).latent_dist
        reconstruction = model.decode(posterior.sample()).sample
        mse = F.mse_loss(reconstruction, pictures)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(reconstruction, pictures) + 2 * mse + 1e-3 * kl
        running["mse"] += 0.005 * (mse.item() - running["mse"])
        running["psnr"] = 10 * math.log10(4 / running["mse"])
        running["kl"] = kl.item()
        return loss, running

    Trainer(model, compute_loss, args.work_dir / "vae.pt", args.minutes, batch_size, 1.5e-3).run()


@torch.no_grad()
def cache_latents(work_dir: Path) -> dict[str, torch.Tensor]:
    """Encodes every emoji that the U-Net learns on every colour, with several scales and shifts.

    Returns:
        "latents" (emoji, colour, augmentation, 4, 16, 16), scaled to unit standard deviation, and
        "scaling_factor".
    """
    path = work_dir / "latents.pt"
    if path.exists():
        return torch.load(path)
    vae = load_averaged(build_vae(), work_dir / "vae.pt").to(memory_format=torch.channels_last)
    rng = random.Random(0)
    rows = []
    for emoji in tqdm(drawn_emoji(), desc="latents", mininterval=20):
        pictures = [render(emoji.char, colour, rng) for colour in COLOURS for _ in range(LATENT_AUGMENTATIONS)]
        means = vae.encode(to_tensor(pictures)).latent_dist.mean
        rows.append(means.contiguous().view(len(COLOURS), LATENT_AUGMENTATIONS, *means.shape[1:]))
    latents = torch.stack(rows)
    scaling_factor = 1 / latents.std()
    cache = {"latents": latents * scaling_factor, "scaling_factor": scaling_factor}
    save_atomically(cache, path)
    return cache


@torch.no_grad()
def encode_captions(work_dir: Path) -> dict[str, torch.Tensor]:
    """Hidden states (length, width) of every caption, the empty one included, from CLIP's text tower."""
    tokenizer = build_tokenizer()
    clip = load_averaged(build_clip(tokenizer), work_dir / "clip.pt")
    captions = ["", *all_captions()]
    hidden = torch.cat(
        [
            clip.text_model(input_ids=tokenize(tokenizer, captions[first : first + 64])).last_hidden_state
            for first in range(0, len(captions), 64)
        ]
    )
    return dict(zip(captions, hidden, strict=True))


def train_unet(args: argparse.Namespace) -> None:
    """v-prediction on cached latents, with the captions dropped now and then for guidance."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    latents = cache_latents(args.work_dir)["latents"]
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    embeddings = encode_captions(args.work_dir)
    model = initial(build_unet(), args.start_from)
    scheduler = build_scheduler()
    emoji, colours = drawn_emoji(), list(COLOURS)
    batch_size = 16
    rng = random.Random(time.time_ns())
    running = {"loss": 1.0}

    def compute_loss():
        clean, context = [], []
        for _ in range(batch_size):
            which, colour = rng.randrange(len(emoji)), rng.randrange(len(colours))
            clean.append(latents[which, colour, rng.randrange(LATENT_AUGMENTATIONS)])
            dropped = rng.random() < CAPTION_DROP
            text = "" if dropped else random_caption(emoji[which], colours[colour], rng)
            context.append(embeddings[text])
        clean, context = torch.stack(clean), torch.stack(context)
        noise = torch.randn_like(clean)
        # One timestep from each of batch_size equal spans: less variance than independent draws.
        spans = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
        timesteps = (spans * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps, context).sample, target)
        running["loss"] += 0.005 * (loss.item() - running["loss"])
        return loss, running

    Trainer(model, compute_loss, args.work_dir / "unet.pt", args.minutes, batch_size, 1e-3).run()


STAGES = {"clip": train_clip, "vae": train_vae, "unet": train_unet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--minutes", type=float, required=True, help="wall time of the stage over all starts")
    parser.add_argument("--start-from", type=Path, help="folder of saved weights to begin with")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(time.time_ns())
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
