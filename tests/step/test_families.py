"""CatStep on the model families of diffusers, each small and random, against the family's own training script."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_rs import CatStep
from cat_rs.errors import ShapeError
from tests.comparison import compare_with_recipe, ddpm, flow_matching
from tests.models import CROSS, add_lora, lora_parameters, randomize_b, tiny_text_encoder, tiny_transformer, tiny_unet

BATCH, WORDS, POOLED = 2, 5, 8
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
JOINT_ATTENTION = [*ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]

Predict = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        build: The model, with random weights.
        condition: Draws one condition; called for prompts with and without the trigger.
        shape: Of the latents.
        targets: The layers that the family's training script adapts.
        predict: How that script calls the model.
        scheduler: Makes the scheduler.
        prediction_type: As of the scheduler.
    """

    build: Callable[[], torch.nn.Module]
    condition: Callable[[], dict[str, Any]]
    shape: tuple[int, ...]
    targets: list[str]
    predict: Predict
    scheduler: Callable[[], Any] = flow_matching
    prediction_type: str = "flow"

    def batch(self, number: int) -> dict[str, Any]:
        """A step's arguments."""
        torch.manual_seed(number)
        timesteps = torch.randint(1000, (BATCH,))
        if self.prediction_type == "flow":
            timesteps = self.scheduler().timesteps[timesteps]
        return {
            "latents": torch.randn(self.shape),
            "noise": torch.randn(self.shape),
            "timesteps": timesteps,
            "cond": self.condition(),
            "cond_no_trigger": self.condition(),
        }


def random_model(cls: Any, **settings: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    return cls(**settings).requires_grad_(False)


def plain(model: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, cond: Mapping[str, Any]) -> torch.Tensor:
    return model(z, timestep=t, return_dict=False, **cond)[0]


def thousandths(model: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, cond: Mapping[str, Any]) -> torch.Tensor:
    return model(hidden_states=z, timestep=t / 1000, return_dict=False, **cond)[0]


def words() -> torch.Tensor:
    return torch.randn(BATCH, WORDS, CROSS)


def masked_words(mask: str = "encoder_attention_mask") -> dict[str, Any]:
    return {"encoder_hidden_states": words(), mask: torch.tensor([[1] * WORDS, [1] * (WORDS - 2) + [0] * 2])}


def sdxl() -> torch.nn.Module:
    return tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
    )


def sdxl_condition() -> dict[str, Any]:
    added = {"text_embeds": torch.randn(BATCH, POOLED), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * BATCH)}
    return {"encoder_hidden_states": words(), "added_cond_kwargs": added}


def sd3_condition() -> dict[str, Any]:
    return {"encoder_hidden_states": words(), "pooled_projections": torch.randn(BATCH, POOLED)}


def flux() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return random_model(
        FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=CROSS,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def position_ids(height: int, width: int, axes: int = 3) -> torch.Tensor:
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.view(-1, axes)


def flux_condition() -> dict[str, Any]:
    return {
        **sd3_condition(),
        "guidance": torch.full((BATCH,), 3.5),
        "img_ids": position_ids(4, 4),
        "txt_ids": torch.zeros(WORDS, 3),
    }


def pixart() -> torch.nn.Module:
    from diffusers import PixArtTransformer2DModel

    return random_model(
        PixArtTransformer2DModel,
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=CROSS,
        use_additional_conditions=False,
    )


def pixart_condition() -> dict[str, Any]:
    return {**masked_words(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def mean_of_learned_variance(
    model: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, cond: Mapping[str, Any]
) -> torch.Tensor:
    return plain(model, z, t, cond).chunk(2, 1)[0]


def sana(timestep_scale: float = 1.0) -> torch.nn.Module:
    from diffusers import SanaTransformer2DModel

    return random_model(
        SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=CROSS,
        sample_size=8,
        timestep_scale=timestep_scale,
    )


def scaled_sana() -> torch.nn.Module:
    return sana(0.001)


def scaled_time(model: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, cond: Mapping[str, Any]) -> torch.Tensor:
    return plain(model, z, t * 0.001, cond)


def lumina2() -> torch.nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return random_model(
        Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=CROSS,
    )


def from_noise_to_data(
    model: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, cond: Mapping[str, Any]
) -> torch.Tensor:
    return -plain(model, z, 1 - t / 1000, cond)


def z_image() -> torch.nn.Module:
    from diffusers import ZImageTransformer2DModel

    return random_model(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=CROSS,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    )


def z_image_condition() -> dict[str, Any]:
    return {"cap_feats": [torch.randn(int(length), CROSS) for length in torch.randint(3, 40, (BATCH,))]}


def as_lists(model: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, cond: Mapping[str, Any]) -> torch.Tensor:
    frames = list(z.unsqueeze(2).unbind(dim=0))
    return -torch.stack(model(frames, (1000 - t) / 1000, cond["cap_feats"], return_dict=False)[0]).squeeze(2)


def qwen_image() -> torch.nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return random_model(
        QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=CROSS,
        axes_dims_rope=(2, 2, 4),
    )


def qwen_image_condition() -> dict[str, Any]:
    return {**masked_words("encoder_hidden_states_mask"), "img_shapes": [[(1, 4, 4)]] * BATCH}


def wan() -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    return random_model(
        WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=CROSS,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def ltx() -> torch.nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return random_model(
        LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=CROSS,
        num_layers=1,
    )


def ltx_condition() -> dict[str, Any]:
    return {**masked_words(), "num_frames": 2, "height": 4, "width": 4}


NOISE: dict[str, Any] = {"scheduler": ddpm, "prediction_type": "epsilon"}
IMAGE, PACKED, VIDEO = (BATCH, 4, 8, 8), (BATCH, 16, 16), (BATCH, 4, 2, 4, 4)
FAMILIES = {
    "sd15": Family(tiny_unet, lambda: {"encoder_hidden_states": words()}, IMAGE, ATTENTION, plain, **NOISE),
    "sdxl": Family(sdxl, sdxl_condition, IMAGE, ATTENTION, plain, **NOISE),
    "sd3": Family(tiny_transformer, sd3_condition, IMAGE, JOINT_ATTENTION, plain),
    "flux": Family(flux, flux_condition, PACKED, [*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2"], thousandths),
    "pixart": Family(pixart, pixart_condition, IMAGE, ATTENTION, mean_of_learned_variance, **NOISE),
    "sana": Family(sana, masked_words, IMAGE, ["to_k", "to_q", "to_v"], plain),
    "sana-scaled-time": Family(scaled_sana, masked_words, IMAGE, ["to_k", "to_q", "to_v"], scaled_time),
    "lumina2": Family(lumina2, masked_words, IMAGE, ATTENTION, from_noise_to_data),
    "z-image": Family(z_image, z_image_condition, IMAGE, ATTENTION, as_lists),
    "qwen-image": Family(qwen_image, qwen_image_condition, PACKED, ATTENTION, thousandths),
    "wan": Family(wan, lambda: {"encoder_hidden_states": words()}, VIDEO, ATTENTION, plain),
    "ltx": Family(ltx, ltx_condition, (BATCH, 2 * 4 * 4, 4), ATTENTION, plain),
}


def adapted(base: torch.nn.Module, targets: list[str]) -> torch.nn.Module:
    """A copy with an adapter."""
    model = copy.deepcopy(base)
    if hasattr(model, "add_adapter"):
        return add_lora(model, target_modules=targets)
    # PixArt's script does this: the class is no PeftAdapterMixin.
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    randomize_b(model)
    return model


def compare(family: Family, batches: list[dict[str, Any]], *, with_predict: bool = False) -> None:
    """Trains with CatStep and as the family's script does; every parameter of the adapter must train."""
    base = family.build()
    model = adapted(base, family.targets)
    before = lora_parameters(model)
    compare_with_recipe(
        model,
        base,
        batches,
        scheduler=family.scheduler(),
        prediction_type=family.prediction_type,
        **({"predict": family.predict} if with_predict else {"recipe_options": {"predict": family.predict}}),
    )
    assert not [name for name, param in lora_parameters(model).items() if torch.equal(param, before[name])]


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_plain_recipe(name: str) -> None:
    compare(FAMILIES[name], [FAMILIES[name].batch(n) for n in range(5)])


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_of_another_model_are_named(name: str) -> None:
    family = FAMILIES[name]
    batch = family.batch(0)
    axis = 2 if batch["latents"].dim() == 3 else 1
    for each in ("latents", "noise"):
        batch[each] = batch[each].narrow(axis, 0, batch[each].shape[axis] - 1).contiguous()
    step = CatStep(adapted(family.build(), family.targets), family.scheduler())
    with pytest.raises(ShapeError, match=r"`latents` must have .* channels, as .* takes, got"):
        step(**batch)


def test_position_ids_as_long_as_the_batch_is_large() -> None:
    # The text's position ids [5, 3] could be taken for a batch of 5.
    batches = []
    for n in range(3):
        one = FAMILIES["flux"].batch(n)
        for name in ("latents", "noise", "timesteps"):
            one[name] = torch.cat([one[name]] * 3)[:WORDS]
        for name in ("cond", "cond_no_trigger"):
            tensors = {key: torch.cat([value] * 3)[:WORDS] for key, value in one[name].items() if "ids" not in key}
            one[name] = {**one[name], **tensors}
        batches.append(one)
    compare(FAMILIES["flux"], batches)


def inpaint(model: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, cond: Mapping[str, Any]) -> torch.Tensor:
    return model(torch.cat([z, cond["mask_and_picture"]], 1), t, cond["encoder_hidden_states"], return_dict=False)[0]


def test_inpainting_needs_predict() -> None:
    def condition() -> dict[str, Any]:
        return {"encoder_hidden_states": words(), "mask_and_picture": torch.randn(BATCH, 5, 8, 8)}

    family = Family(lambda: tiny_unet(in_channels=9), condition, IMAGE, ATTENTION, inpaint, **NOISE)
    compare(family, [family.batch(n) for n in range(5)], with_predict=True)


DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
SNIPPETS = dict(re.findall(r"<!-- runs in \S+: (\S+) -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
# What a family's pipeline.encode_prompt returns, as keys of the condition.
ENCODED = {
    "sdxl": ("encoder_hidden_states", "text_embeds"),
    "sd3": ("encoder_hidden_states", "pooled_projections"),
    "flux": ("encoder_hidden_states", "pooled_projections", "txt_ids"),
    "z-image": ("cap_feats",),
    "qwen-image": ("encoder_hidden_states", "encoder_hidden_states_mask"),
    **dict.fromkeys(("pixart", "sana", "lumina2", "ltx"), ("encoder_hidden_states", "encoder_attention_mask")),
}


def run_snippet(name: str, **names: Any) -> None:
    """Runs a snippet of the document; its step must train."""
    names = {"CatStep": CatStep, "torch": torch, "prompts": ["a"], "prompts_no_trigger": ["b"], **names}
    exec(SNIPPETS[name], names)
    assert names["metrics"].loss.isfinite()
    assert names["metrics"].grad_norm > 0


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sana-scaled-time"])
def test_the_snippet_in_the_document_runs(name: str) -> None:
    family = FAMILIES[name]
    model = adapted(family.build(), family.targets)

    def encode_prompt(prompts: list[str]) -> Any:
        condition = family.condition()
        values = {**condition, **condition.get("added_cond_kwargs", {})}
        encoded = [values[key] for key in ENCODED.get(name, ("encoder_hidden_states",))]
        return encoded if len(encoded) > 1 else encoded[0]

    run_snippet(
        name,
        unet=model,
        transformer=model,
        scheduler=family.scheduler(),
        latents=torch.randn(family.shape),
        encode_prompt=encode_prompt,
        time_ids=torch.ones(BATCH, 6),
        latent_image_ids=position_ids(4, 4),
        # Of the picture's latents for Qwen-Image, which packs 2x2; of the video's for LTX.
        **({"num_frames": 2, "height": 4, "width": 4} if name == "ltx" else {"height": 8, "width": 8}),
    )


def test_the_snippet_for_inpainting_runs() -> None:
    run_snippet(
        "inpainting",
        unet=adapted(tiny_unet(in_channels=9), ATTENTION),
        scheduler=ddpm(),
        latents=torch.randn(IMAGE),
        mask_and_picture=torch.randn(BATCH, 5, 8, 8),
        encode_prompt=lambda prompts: words(),
    )


def test_the_snippet_for_autocast_runs() -> None:
    run_snippet(
        "autocast",
        unet=adapted(tiny_unet(), ATTENTION),
        scheduler=ddpm(),
        latents=torch.randn(IMAGE),
        encode_prompt=lambda prompts: words(),
    )


def test_the_snippet_for_text_encoders_runs() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    run_snippet(
        "text-encoder",
        unet=adapted(tiny_unet(), ATTENTION),
        text_encoder=tiny_text_encoder(),
        scheduler=ddpm(),
        latents=torch.randn(IMAGE),
        input_ids=torch.randint(2, 40, (BATCH, WORDS)),
        input_ids_no_trigger=torch.randint(2, 40, (BATCH, WORDS)),
        LoraConfig=LoraConfig,
        inject_adapter_in_model=inject_adapter_in_model,
    )


def test_every_snippet_is_run() -> None:
    assert set(SNIPPETS) == {*FAMILIES, "inpainting", "text-encoder", "autocast"} - {"sana-scaled-time"}
