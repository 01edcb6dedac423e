"""FLUX, whose kohya files join query, key and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cat_rs
from tests.models import add_lora

from .models import (
    FLUX_LAYERS,
    SINGLE_LAYERS,
    add_text_lora,
    assert_same_scales,
    assert_same_state,
    clip,
    flux_transformer,
    state_of,
)


def run_flux(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        return transformer(
            hidden_states=random(1, 4, 4),
            encoder_hidden_states=random(1, 3, 16),
            pooled_projections=random(1, 16),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


def flux_pipeline(transformer: Any, text_encoder: Any = None) -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=text_encoder,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def flux_with_lora(layers: list[str], **settings: Any) -> Any:
    pattern = "|".join(layer if "\\" in layer else layer.replace(".", r"\.") for layer in layers)
    return add_lora(flux_transformer(), target_modules=rf"(?:.*\.)?(?:{pattern})", **settings)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_diffusers_reads_flux(format: str, tmp_path: Path) -> None:
    # diffusers' reader of kohya files takes single blocks of FLUX's own width only: see the next test.
    layers = [layer.replace("attn.", r"^transformer_blocks\.\d+\.attn\.") for layer in FLUX_LAYERS]
    # Of layers outside the blocks it loses the prefix, without which they are not loaded.
    pattern = "|".join(layer for layer in layers if format == "diffusers" or layer != "x_embedder")
    transformer = add_lora(flux_transformer(), target_modules=rf"(?:.*\.)?(?:{pattern})", r=2)
    assert any("transformer_blocks.1.attn.add_q_proj.lora_B" in name for name in state_of(transformer))
    encoder = clip()
    add_text_lora(encoder, seed=7, r=2, lora_alpha=6)
    file = cat_rs.save_lora(tmp_path / "a.safetensors", transformer, format=format, text_encoder=encoder)
    pipeline = flux_pipeline(flux_transformer(), clip())
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected = run_flux(transformer)
    assert (run_flux(flux_transformer()) - expected).abs().max() > 1e-2
    torch.testing.assert_close(run_flux(pipeline.transformer), expected, atol=1e-5, rtol=1e-4)
    ids = torch.tensor([[0, 5, 7, 1]])
    torch.testing.assert_close(
        pipeline.text_encoder(ids).last_hidden_state, encoder(ids).last_hidden_state, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"attn.to_q": 4}, "alpha_pattern": {"attn.to_k": 3}}])
@pytest.mark.parametrize("layers", [["attn.to_q", "attn.to_k"], [*FLUX_LAYERS, *SINGLE_LAYERS]])
def test_flux_comes_back_from_kohya(layers: list[str], settings: dict[str, Any], tmp_path: Path) -> None:
    transformer = flux_with_lora(layers, r=2, lora_alpha=4, **settings)
    file = cat_rs.save_lora(tmp_path / "a.safetensors", transformer, format="kohya")
    other = flux_transformer()
    lora = cat_rs.load_lora(file, model=other)
    assert lora.family == "flux"
    torch.testing.assert_close(run_flux(other), run_flux(transformer), atol=1e-5, rtol=1e-4)
    if not settings:
        assert_same_state(other, transformer)
        assert_same_scales(other, transformer)


def test_diffusers_takes_joined_single_blocks_apart(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    width, wide = 3072, 12288
    block = "transformer.single_transformer_blocks.5"
    sizes = {"attn.to_q": width, "attn.to_k": width, "attn.to_v": width, "proj_mlp": wide}
    state = {}
    for name, rows in sizes.items():
        state[f"{block}.{name}.lora_A.weight"] = torch.randn(2, width)
        state[f"{block}.{name}.lora_B.weight"] = torch.randn(rows, 2)
        state[f"{block}.{name}.alpha"] = torch.tensor(4.0)
    file = cat_rs.save_lora(tmp_path / "a.safetensors", state, format="kohya")
    assert set(load_file(file)) == {
        f"lora_unet_single_blocks_5_linear1.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    found = FluxPipeline.lora_state_dict(str(tmp_path), weight_name=file.name)
    for name in sizes:
        # diffusers folds alpha / r, here 2, into A.
        assert torch.equal(found[f"{block}.{name}.lora_A.weight"], 2 * state[f"{block}.{name}.lora_A.weight"])
        assert torch.equal(found[f"{block}.{name}.lora_B.weight"], state[f"{block}.{name}.lora_B.weight"])
