"""Train a LoRA on a folder of captioned pictures. docs/in-your-script.md shows how this script's variants differ."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from cat_rs import CatStep, remove_trigger
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/emoji_model/model", help="Stable Diffusion: a folder or hub id")
    parser.add_argument("--data", required=True, help="folder of pictures with captions in metadata.jsonl")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--resolution", type=int, help="the model's own if not given")
    parser.add_argument("--trigger_word", required=True, help="such as: sks")
    parser.add_argument("--class_word", required=True, help="such as: fruit")
    parser.add_argument("--cat_factor", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max_train_steps", type=int, default=400)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--lr_scheduler", default="constant")
    parser.add_argument("--lr_warmup_steps", type=int, default=0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class PictureFolder(Dataset):
    def __init__(self, folder, resolution):
        self.folder = Path(folder)
        # Lines end at "\n" only: a caption may hold other characters that str.splitlines splits at.
        with (self.folder / "metadata.jsonl").open(encoding="utf-8-sig", newline="\n") as lines:
            self.rows = [json.loads(line) for line in lines if line.strip()]
        self.size = (resolution, resolution)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        picture = ImageOps.fit(Image.open(self.folder / row["file_name"]).convert("RGB"), self.size)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1, row["text"]


def main():
    args = parse_args()
    # With a handful of pictures an epoch is short: an accumulated batch may reach over its end.
    accumulation = GradientAccumulationPlugin(args.gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = Accelerator(gradient_accumulation_plugin=accumulation)
    set_seed(args.seed)

    pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32).to(accelerator.device)
    vae, unet, noise_scheduler = pipeline.vae, pipeline.unet, pipeline.scheduler
    for model in (vae, unet, pipeline.text_encoder):
        model.requires_grad_(False)
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=attention))

    resolution = args.resolution or unet.config.sample_size * pipeline.vae_scale_factor
    dataset = PictureFolder(args.data, resolution)
    train_dataloader = DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True)

    cat_step = CatStep(
        unet,
        noise_scheduler,
        lr=args.learning_rate,
        cat_factor=args.cat_factor,
        max_grad_norm=args.max_grad_norm,
        accumulate=args.gradient_accumulation_steps,
    )
    optimizer = cat_step.optimizer
    # accelerate moves the schedule on once for each process.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )

    def encode(captions):
        tokens = pipeline.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return pipeline.text_encoder(tokens.input_ids.to(accelerator.device))[0]

    unet.train()
    global_step = 0
    progress_bar = tqdm(total=args.max_train_steps, disable=not accelerator.is_local_main_process)
    while global_step < args.max_train_steps:
        for pixels, captions in train_dataloader:
            with accelerator.accumulate(unet):
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                prompt_embeds = encode(captions)
                no_trigger = [remove_trigger(caption, args.trigger_word, args.class_word)[0] for caption in captions]
                loss = cat_step(latents, prompt_embeds, encode(no_trigger)).loss
                lr_scheduler.step()
            if accelerator.sync_gradients:
                global_step += 1
                progress_bar.update()
                progress_bar.set_postfix(loss=f"{loss.item():.4f}")
            if global_step >= args.max_train_steps:
                break
    progress_bar.close()

    if accelerator.is_main_process:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(unet)))
        pipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)


if __name__ == "__main__":
    main()
