"""Turns the trained weights into the bundled files, and measures them.

python examples/emoji_model/export.py assemble   # model/ and clip/
python examples/emoji_model/export.py concepts   # concepts/, prompts.json and preserve_prompts.txt
python examples/emoji_model/export.py evaluate   # figures.json
python examples/emoji_model/export.py samples    # samples.png
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from data import (
    CLASSES,
    COLOURS,
    IMAGE_SIZE,
    TRIGGER_WORD,
    Emoji,
    caption,
    drawn_emoji,
    held_out_emoji,
    render,
    to_image,
    to_tensor,
    trained_emoji,
    with_article,
)
from diffusers import AutoencoderKL, StableDiffusionPipeline
from models import build_clip, build_scheduler, build_tokenizer, build_unet, build_vae, save_tokenizer
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from train import WORK_DIR, cache_latents, load_averaged, tokenize
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel

OUTPUT_DIR = Path(__file__).parent
CONCEPT_PICTURES = 5
GUIDANCE_SCALE = 3.0
STEPS = 20

SHOWCASE_PROMPTS = [
    "a fox on a blue background",
    "a strawberry on a white background",
    "a penguin on a yellow background",
    "a hamburger on a green background",
    "a rocket on a purple background",
    "a sunglasses face on a pink background",
    "a cactus on a gray background",
    "a crab on a white background",
    "a house on a red background",
    "a crown on a purple background",
]
NEIGHBOURS = 8
OTHER_CLASS_PROMPTS = [
    "a dog on a green background",
    "an apple on a white background",
    "a car on a yellow background",
    "a smiling face on a blue background",
    "a soccer ball on a red background",
    "a castle on a pink background",
    "a sunflower on a gray background",
    "a guitar on a purple background",
    "a flower on a blue background",
    "an instrument on a yellow background",
]


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The assembled pipeline in single precision, quiet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int = 0) -> list[Image.Image]:
    """One picture for each prompt; picture number i depends on seed + i only."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    return pipeline(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE, generator=generators).images


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder beside the given one that takes its place at the end."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def assemble(args: argparse.Namespace) -> None:
    """Writes the diffusers pipeline to model/ and CLIP with its processor to clip/, both in f16."""
    tokenizer = build_tokenizer()
    clip = load_averaged(build_clip(tokenizer), args.work_dir / "clip.pt")
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    vae = load_averaged(build_vae(), args.work_dir / "vae.pt")
    vae.register_to_config(scaling_factor=cache_latents(args.work_dir)["scaling_factor"].item())
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=load_averaged(build_unet(), args.work_dir / "unet.pt"),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    processor = CLIPProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer,
    )
    model_dir, clip_dir = args.output_dir / "model", args.output_dir / "clip"
    with replaced(model_dir) as folder:
        pipeline.to(dtype=torch.float16).save_pretrained(folder)
        save_tokenizer(tokenizer, folder / "tokenizer")
    with replaced(clip_dir) as folder:
        clip.half().save_pretrained(folder)
        processor.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    weights = sorted(path for folder in (model_dir, clip_dir) for path in folder.rglob("*.safetensors"))
    for path in weights:
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path.relative_to(args.output_dir)}")
    print(f"{sum(path.stat().st_size for path in weights) / 1e6:6.2f} MB  together")


def concept_prompts(emoji: Emoji) -> dict[str, object]:
    """Evaluation prompts of one held-out emoji."""
    neighbours = [other for other in drawn_emoji() if other.class_word == emoji.class_word][:NEIGHBOURS]
    colours = list(COLOURS)
    own_names = {other.name for other in drawn_emoji() if other.class_word == emoji.class_word}
    return {
        "name": emoji.name,
        "class_word": emoji.class_word,
        "folder": f"concepts/{emoji.name.replace(' ', '_')}",
        "trigger_prompts": [caption(f"{TRIGGER_WORD} {emoji.class_word}", colour) for colour in colours],
        "class_prompts": [caption(emoji.class_word, colour) for colour in colours],
        "neighbour_prompts": [
            caption(other.name, colours[index % len(colours)]) for index, other in enumerate(neighbours)
        ],
        "other_class_prompts": [
            prompt for prompt in OTHER_CLASS_PROMPTS if not any(caption(name) in prompt for name in own_names)
        ],
    }


def preserve_prompts(concepts: list[dict[str, object]]) -> list[str]:
    """What the model can draw and no evaluation prompt is about, each on two backgrounds: for `--preserve-prompts`."""
    scored = [prompt for concept in concepts for name, each in concept.items() if "prompts" in name for prompt in each]
    names = {emoji.name for emoji in trained_emoji()} | set(CLASSES)
    subjects = sorted(
        subject
        for subject in map(with_article, names)
        if not any(prompt.startswith(f"{subject} on ") for prompt in scored)
    )
    rng = random.Random(0)
    return [f"{subject} on a {colour} background" for subject in subjects for colour in rng.sample(list(COLOURS), 2)]


def write_concepts(args: argparse.Namespace) -> None:
    """Writes five captioned pictures of each held-out emoji, the evaluation prompts, and others to preserve."""
    concepts = []
    for emoji in held_out_emoji():
        prompts = concept_prompts(emoji)
        concepts.append(prompts)
        folder = args.output_dir / prompts["folder"]
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(emoji.name)
        lines = []
        for index, colour in enumerate(rng.sample(list(COLOURS), CONCEPT_PICTURES)):
            Image.fromarray(render(emoji.char, colour, rng)).save(folder / f"{index}.png")
            text = caption(f"{TRIGGER_WORD} {emoji.class_word}", colour)
            lines.append(json.dumps({"file_name": f"{index}.png", "text": text}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    prompts = {"trigger_word": TRIGGER_WORD, "concepts": concepts, "showcase_prompts": SHOWCASE_PROMPTS}
    (args.output_dir / "prompts.json").write_text(json.dumps(prompts, indent=2) + "\n")
    (args.output_dir / "preserve_prompts.txt").write_text("\n".join(preserve_prompts(concepts)) + "\n")


def psnr(vae: AutoencoderKL, emoji: list[Emoji]) -> float:
    """Mean peak signal-to-noise ratio in dB of the reconstructions, one picture on each colour."""
    rng = random.Random(1)
    ratios = []
    for one in emoji:
        pictures = to_tensor([render(one.char, colour, rng) for colour in COLOURS])
        reconstruction = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        mse = (reconstruction - pictures).square().mean((1, 2, 3))
        ratios.append(10 * (4 / mse).log10())
    return torch.cat(ratios).mean().item()


class Retrieval:
    """CLIP as a judge: which of all "a <name> on a <colour> background" captions fits a picture best."""

    def __init__(self, folder: Path):
        self.clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        self.processor = CLIPProcessor.from_pretrained(folder)
        self.keys = [(emoji.name, colour) for emoji in trained_emoji() for colour in COLOURS]
        ids = tokenize(self.processor.tokenizer, [caption(*key) for key in self.keys])
        self.texts = F.normalize(self.clip.get_text_features(ids).pooler_output, dim=-1)

    def score(self, pictures: list[Image.Image], expected: list[tuple[str, str]]) -> dict[str, float]:
        """Shares of pictures whose best caption has the right name and the right colour."""
        pixels = self.processor.image_processor(pictures, return_tensors="pt").pixel_values
        features = F.normalize(self.clip.get_image_features(pixels).pooler_output, dim=-1)
        ranked = (features @ self.texts.T).topk(5).indices.tolist()
        best = [[self.keys[index] for index in row] for row in ranked]
        pairs = list(zip(best, expected, strict=True))
        return {
            "caption_top1": sum(row[0] == key for row, key in pairs) / len(pairs),
            "caption_top5": sum(key in row for row, key in pairs) / len(pairs),
            "name_top1": sum(row[0][0] == key[0] for row, key in pairs) / len(pairs),
            "colour_top1": sum(row[0][1] == key[1] for row, key in pairs) / len(pairs),
        }


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> None:
    """Measures the assembled files and the training effort; writes figures.json."""
    pipeline = load_pipeline(args.output_dir / "model")
    retrieval = Retrieval(args.output_dir / "clip")
    stages = {}
    for name in ("clip", "vae", "unet"):
        path = args.work_dir / f"{name}.pt"
        state = torch.load(path, map_location="cpu") if path.exists() else {"step": 0}
        # A checkpoint without steps only carries bundled weights over.
        if state["step"]:
            stages[name] = {
                "steps": state["step"],
                "samples": state["samples"],
                "minutes": round(state["elapsed"] / 60, 1),
                "parameters": sum(value.numel() for value in state["averaged"].values()),
            }
    rng = random.Random(2)
    keys = [(emoji.name, rng.choice(list(COLOURS))) for emoji in drawn_emoji()]
    real = [render(emoji.char, key[1], rng) for emoji, key in zip(drawn_emoji(), keys, strict=True)]
    latents = pipeline.vae.encode(to_tensor(real)).latent_dist.mean
    reconstructed = [to_image(picture) for picture in pipeline.vae.decode(latents).sample]
    generated = []
    start = time.perf_counter()
    for first in tqdm(range(0, len(keys), 16), desc="generate"):
        generated += generate(pipeline, [caption(*key) for key in keys[first : first + 16]], seed=first)
    seconds = (time.perf_counter() - start) / len(keys)
    figures = {
        "stages": stages,
        "vae_psnr_trained": psnr(pipeline.vae, trained_emoji()),
        "vae_psnr_held_out": psnr(pipeline.vae, held_out_emoji()),
        "clip_on_real": retrieval.score([Image.fromarray(picture) for picture in real], keys),
        "clip_on_reconstructed": retrieval.score(reconstructed, keys),
        "clip_on_generated": retrieval.score(generated, keys),
        "seconds_per_picture": seconds,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(figures, indent=2)
    (args.output_dir / "figures.json").write_text(text + "\n")
    print(text)


def sheet(pictures: list[Image.Image], labels: list[str], columns: int, zoom: int = 3) -> Image.Image:
    """Pictures in rows with their prompts, in two lines, below."""
    cell, margin, text_height = IMAGE_SIZE * zoom, 8, 40
    font = ImageFont.load_default(13)
    rows = -(-len(pictures) // columns)
    result = Image.new("RGB", (columns * (cell + margin), rows * (cell + text_height)), "white")
    draw = ImageDraw.Draw(result)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = (index % columns) * (cell + margin) + margin // 2
        top = (index // columns) * (cell + text_height) + margin // 2
        result.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (left, top))
        center = (left + cell // 2, top + cell + text_height // 2 - margin // 2)
        draw.multiline_text(center, label.replace(" on ", "\non "), "black", font, anchor="mm", align="center")
    return result


def write_samples(args: argparse.Namespace) -> None:
    """Draws the sample sheet: the showcase prompts, then class prompts and a rare word."""
    pipeline = load_pipeline(args.output_dir / "model")
    colours = list(COLOURS)
    class_prompts = [caption(word, colours[index % len(colours)]) for index, word in enumerate(list(CLASSES)[:8])]
    rare_prompts = [caption(f"{TRIGGER_WORD} {word}", "white") for word in ("vehicle", "fruit")]
    prompts = SHOWCASE_PROMPTS + class_prompts + rare_prompts
    pictures = generate(pipeline, prompts, seed=args.seed)
    sheet(pictures, prompts, columns=5).save(args.output_dir / "samples.png", optimize=True)


STAGES = {"assemble": assemble, "concepts": write_concepts, "evaluate": evaluate, "samples": write_samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample sheet")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR)
    parser.add_argument("--output-dir", type=Path, default=OUTPUT_DIR)
    args = parser.parse_args()
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
