"""Adapters taken out of models and put into models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cat_rs
from cat_rs.adapter_file.layer import parse
from cat_rs.adapter_file.model import family_of_model
from cat_rs.errors import AdapterError
from tests.models import add_lora, tiny_transformer, tiny_unet

from .models import add_text_lora, assert_same_state, clip, flux_transformer, state_of


def test_adapter_of_the_same_shape_is_filled(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet(), seed=2)
    file = cat_rs.save_lora(tmp_path, unet)
    assert file.name == "pytorch_lora_weights.safetensors"
    other = add_lora(tiny_unet(), seed=3)
    cat_rs.load_lora(tmp_path, model=other)
    assert_same_state(other, unet)
    with pytest.raises(AdapterError, match="must have the layers, ranks and scales of the file, got others at"):
        cat_rs.load_lora(tmp_path, model=add_lora(tiny_unet(), r=2))


def test_what_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    cat_rs.save_lora(tmp_path, add_lora(tiny_unet()))
    other = tiny_unet(cross_attention_dim=24)
    with pytest.raises(AdapterError, match=r"attn2.to_k has weight \[16, 24\], which A \[4, 16\]"):
        cat_rs.load_lora(tmp_path, model=other)
    small = tiny_unet(down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
    with pytest.raises(AdapterError, match=r"got a UNet2DConditionModel without down_blocks\.1\.attentions\.0"):
        cat_rs.load_lora(tmp_path, model=small)
    with pytest.raises(AdapterError, match="expected layers of text_encoder, got only unet"):
        cat_rs.load_lora(tmp_path, text_encoder=clip())
    assert not state_of(other)
    assert not state_of(small)


def test_layers_that_end_alike_get_no_adapter(tmp_path: Path) -> None:
    transformer = add_lora(flux_transformer(), target_modules=r"proj_out")
    assert len(state_of(transformer)) == 2
    file = cat_rs.save_lora(tmp_path, transformer)
    other = flux_transformer()
    cat_rs.load_lora(file, model=other)
    assert_same_state(other, transformer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_compiled_and_parallel_models_are_unwrapped(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet())
    expected = load_file(cat_rs.save_lora(tmp_path, unet))
    for number, wrapped in enumerate([torch.compile(unet), torch.nn.DataParallel(unet)]):
        file = cat_rs.save_lora(tmp_path / str(number), wrapped)
        assert load_file(file).keys() == expected.keys()
    other = tiny_unet()
    cat_rs.load_lora(tmp_path, model=torch.compile(other))
    assert_same_state(other, unet)


def test_a_text_encoder_alone(tmp_path: Path) -> None:
    encoder = clip()
    add_text_lora(encoder, seed=5, r=2)
    file = cat_rs.save_lora(tmp_path, encoder)
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in load_file(file))
    other = clip()
    cat_rs.load_lora(file).load_into(other)
    assert_same_state(other, encoder)


def test_a_denoiser_takes_the_files_denoiser_whatever_the_file_calls_it(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet())
    lora = cat_rs.load_lora(cat_rs.save_lora(tmp_path, unet))
    renamed = replace(lora, **{name: {"transformer_2": getattr(lora, name)["unet"]} for name in ("state", "alphas")})
    other = tiny_unet()
    renamed.load_into(other)
    assert_same_state(other, unet)


def test_dtype_and_adapter_name(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet())
    file = cat_rs.save_lora(tmp_path, unet, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    with pytest.raises(AdapterError, match="`adapter_name` must be an adapter of the unet, got 'x': it has 'default'"):
        cat_rs.save_lora(tmp_path, unet, adapter_name="x")
    with pytest.raises(
        AdapterError, match="`model_or_state` must have an adapter, got a UNet2DConditionModel without"
    ):
        cat_rs.save_lora(tmp_path, tiny_unet())
    with pytest.raises(
        AdapterError, match="`text_encoder` must have an adapter, got a CLIPTextModel without one: leave"
    ):
        cat_rs.save_lora(tmp_path, unet, text_encoder=clip())
    other = tiny_unet()
    cat_rs.load_lora(file, model=other, adapter_name="x")
    assert list(other.peft_config) == ["x"]


def test_more_than_lora_is_refused(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet(), modules_to_save=["conv_in"])
    with pytest.raises(AdapterError, match="got unknown names: `conv_in"):
        cat_rs.save_lora(tmp_path, unet)


def test_names_without_a_model_belong_to_the_one_at_hand_that_has_them() -> None:
    tensors = {"own.lora_A.weight": torch.ones(2, 8), "own.lora_B.weight": torch.ones(8, 2)}
    known = {"unet": ["own", "shared"], "text_encoder": ["other", "shared"]}
    (layer,) = parse(tensors, known, None)[2]
    assert layer.component == "unet"
    with pytest.raises(AdapterError, match="expected layers of a known denoiser or text encoder, got own"):
        parse(tensors, {"unet": ["other"], "text_encoder": ["another"]}, None)


def test_a_transformer_is_flux_only_with_its_single_blocks() -> None:
    assert family_of_model(tiny_transformer()) is None
    assert family_of_model(flux_transformer()) == "flux"
