"""Architectures of the emoji model: tokenizer, CLIP, VAE, U-Net and noise schedule."""

import json
from pathlib import Path

from data import IMAGE_SIZE, RARE_WORDS, all_captions, held_out_emoji, other_emoji
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

TEXT_LENGTH = 20
TEXT_WIDTH = 160
LATENT_CHANNELS = 4
LATENT_SIZE = IMAGE_SIZE // 4
VOCAB_SIZE = 1600
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """Trains a byte-level BPE on all captions and emoji names; each rare word gets a token of its own."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=[BOS, EOS, *(letter + "</w>" for letter in alphabet)],
        show_progress=False,
    )
    names = [emoji.name for emoji in other_emoji() + held_out_emoji()]
    bpe.train_from_iterator(all_captions() + 2 * names + 1000 * list(RARE_WORDS), trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=TEXT_LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Saves tokenizer.json, and vocab.json with merges.txt for readers that know only those."""
    tokenizer.save_pretrained(folder)
    trained = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(trained["vocab"], ensure_ascii=False))
    merges = "\n".join(" ".join(pair) for pair in trained["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """CLIP with a three-layer text tower and a three-layer ViT on 8x8 patches."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": 128,
        **special,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def build_vae() -> AutoencoderKL:
    """KL autoencoder that maps 64x64 pictures to 16x16 latents with four channels."""
    channels = (16, 48, 64)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
        force_upcast=False,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR; sampling starts from the last timestep (trailing)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without effect on trailing spacing; the pipeline asks for it
    )


def build_unet() -> UNet2DConditionModel:
    """Three-level U-Net on 16x16 latents with cross attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 80, 128),
        layers_per_block=1,
        attention_head_dim=4,  # the number of heads, despite its name
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )
