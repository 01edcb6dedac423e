"""Merged adapters against PEFT with all of them in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cat_rs
from cat_rs.cli import main
from cat_rs.errors import AdapterError, InvalidValueError
from tests.models import add_lora, tiny_unet

from .models import UNET_LAYERS, add_text_lora, clip, flux_transformer

# PEFT's, of a model's second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

SCALES = (0.7, -0.4)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "same layers": ({"r": 4, "lora_alpha": 6}, {"r": 3, "lora_alpha": 2, "rank_pattern": {"to_q": 2}}),
    "other layers": ({"target_modules": ["to_q", "conv1"]}, {"target_modules": ["to_q", "to_v", "proj_in"]}),
    "rslora": ({"use_rslora": True, "r": 4}, {"r": 2}),
    "bias": ({"lora_bias": True, "target_modules": ["to_out.0"]}, {"target_modules": ["to_out.0", "ff.net.2"]}),
}


def adapters(tmp_path: Path, kind: str) -> tuple[Any, list[Path]]:
    """A model that has both adapters at their scales, and a file of each."""
    model, files = tiny_unet(), []
    for number, settings in enumerate(KINDS[kind]):
        alone = add_lora(tiny_unet(), seed=number, **{"target_modules": UNET_LAYERS, **settings})
        with torch.no_grad():
            for name, param in alone.named_parameters():
                if name.endswith("lora_B.default.bias"):
                    param.copy_(torch.randn_like(param))
        files.append(cat_rs.save_lora(tmp_path / f"{number}.safetensors", alone))
        cat_rs.load_lora(files[-1], model=model, adapter_name=f"a{number}")
    model.set_adapters(["a0", "a1"], list(SCALES))
    return model, files


def output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents, prompt = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 16)))
    with torch.no_grad():
        return model(latents, 7, prompt).sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_a_merged_file_computes_what_the_adapters_do_together(kind: str, format: str, tmp_path: Path) -> None:
    both, files = adapters(tmp_path, kind)
    merged = cat_rs.merge_loras(files, SCALES)
    assert merged.capped == ()
    path = cat_rs.save_lora(tmp_path / ("m.safetensors" if format == "diffusers" else "m"), merged.lora, format=format)
    model = tiny_unet()
    base = output(model)
    cat_rs.load_lora(path, model=model)
    expected = output(both)
    assert (expected - base).norm() > 0.01 * base.norm()
    assert (output(model) - expected).norm() <= 1e-5 * expected.norm()


def test_a_single_adapter_gets_its_scale_folded_in(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet(), r=4, lora_alpha=6)
    file = cat_rs.save_lora(tmp_path / "a.safetensors", unet, metadata={"trigger": "sks"})
    lora = cat_rs.merge_loras([file], [0.5]).lora
    unet.set_adapters(["default"], [0.5])
    model = tiny_unet()
    lora.load_into(model)
    assert (output(model) - output(unet)).norm() <= 1e-5 * output(unet).norm()
    assert lora.metadata == {"merged": [{"scale": 0.5, "trigger": "sks"}]}


def test_text_encoders_are_merged_under_either_spelling(tmp_path: Path) -> None:
    encoder = clip()
    add_text_lora(encoder, seed=1, r=2)
    lora = cat_rs.load_lora(cat_rs.save_lora(tmp_path / "a.safetensors", None, text_encoder=encoder))
    bare = {name.removeprefix("text_model."): tensor for name, tensor in lora.state["text_encoder"].items()}
    alphas = {name.removeprefix("text_model."): alpha for name, alpha in lora.alphas["text_encoder"].items()}
    other = cat_rs.LoraFile({"text_encoder": bare}, {"text_encoder": alphas}, {}, {}, {}, "diffusers", None)
    merged = cat_rs.merge_loras([lora, other]).lora
    assert len(merged.alphas["text_encoder"]) == len(alphas)
    assert set(merged.alphas["text_encoder"].values()) == {4.0}


def test_a_cap_limits_what_adds_up(tmp_path: Path) -> None:
    file = cat_rs.save_lora(tmp_path / "a.safetensors", add_lora(tiny_unet(), r=4, target_modules=["to_q"]))
    other = cat_rs.save_lora(
        tmp_path / "b.safetensors", add_lora(tiny_unet(), seed=9, r=4, target_modules=["to_q", "to_k"])
    )

    def updates(lora: cat_rs.LoraFile) -> dict[str, torch.Tensor]:
        state = {name: tensor.double() for name, tensor in lora.state["unet"].items()}
        return {
            name: state[f"{name}.lora_B.weight"]
            @ state[f"{name}.lora_A.weight"]
            * alpha
            / len(state[f"{name}.lora_A.weight"])
            for name, alpha in lora.alphas["unet"].items()
        }

    alone = updates(cat_rs.load_lora(file))
    # The same adapter twice: every direction doubles.
    merged = cat_rs.merge_loras([file, file], cap=1.0)
    assert {layer.module for layer in merged.capped} == set(alone)
    found = updates(merged.lora)
    for layer in merged.capped:
        u, s, vh = torch.linalg.svd(2 * alone[layer.module])
        limit = float(s[0]) / 2
        assert layer.limit == pytest.approx(limit, rel=1e-6)
        assert layer.largest == pytest.approx(float(s[0]), rel=1e-6)
        assert layer.changed == int((s > limit * (1 + 1e-9)).sum())
        expected = u[:, : len(s)] * s.clamp(max=limit) @ vh
        torch.testing.assert_close(found[layer.module], expected, atol=1e-6, rtol=1e-5)
    # A layer that one adapter alone has is not changed.
    capped = cat_rs.merge_loras([file, other], cap=1.0)
    untouched = updates(capped.lora)
    theirs = updates(cat_rs.load_lora(other))
    for name in theirs.keys() - alone.keys():
        torch.testing.assert_close(untouched[name], theirs[name], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([],), "`adapters` must be a list of adapters"),
        (("a.safetensors",), "`adapters` must be a list of adapters"),
        (([3],), "`adapters` must be a list of adapters, each a path or a LoraFile, got 3"),
        ((["<a>"], [1.0, 2.0]), "`scales` must be 1 finite numbers"),
        ((["<a>"], [float("nan")]), "`scales` must be 1 finite numbers"),
        ((["<a>"], ["x"]), "`scales` must be a number for each adapter"),
        ((["<a>"], [1.0], 0.0), "`cap` must be a finite number > 0 or None, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], text: str, tmp_path: Path) -> None:
    file = cat_rs.save_lora(tmp_path / "a.safetensors", add_lora(tiny_unet()))
    adapters, *others = arguments
    given = [file if each == "<a>" else each for each in adapters] if isinstance(adapters, list) else adapters
    with pytest.raises(InvalidValueError, match=f"^merge_loras: {text}"):
        cat_rs.merge_loras(given, *others[:1], **({"cap": others[1]} if len(others) > 1 else {}))


def test_adapters_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    file = cat_rs.save_lora(tmp_path / "a.safetensors", add_lora(tiny_unet()))
    dora = cat_rs.save_lora(tmp_path / "b.safetensors", add_lora(tiny_unet(), use_dora=True))
    wide = cat_rs.save_lora(
        tmp_path / "c.safetensors", add_lora(tiny_unet(cross_attention_dim=24), target_modules=["to_k"])
    )
    flux = cat_rs.save_lora(
        tmp_path / "d.safetensors", add_lora(flux_transformer(), target_modules=["to_q", "proj_mlp"])
    )
    with pytest.raises(AdapterError, match=r"^merge_loras: expected LoRA, got a DoRA at .*to_"):
        cat_rs.merge_loras([file, dora])
    with pytest.raises(AdapterError, match=r"^merge_loras: expected adapters for one model, got .*attn2.to_k with A"):
        cat_rs.merge_loras([file, wide])
    with pytest.raises(AdapterError, match=r"^merge_loras: expected adapters for one model"):
        cat_rs.merge_loras([cat_rs.LoraFile(**{**vars(cat_rs.load_lora(file)), "family": "sd"}), flux])


def test_the_command_writes_the_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both, files = adapters(tmp_path, "same layers")
    path = tmp_path / "merged.safetensors"
    arguments = ["merge", *map(str, files), "--output", str(path), "--scales", *map(str, SCALES)]
    assert main(arguments) == 0
    assert "0.7 0.safetensors + -0.4 1.safetensors" in capsys.readouterr().out
    model = tiny_unet()
    cat_rs.load_lora(path, model=model)
    assert (output(model) - output(both)).norm() <= 1e-5 * output(both).norm()
    capped = [*arguments, "--cap", "0.5", "--dtype", "bfloat16"]
    before = path.read_bytes()
    assert main(capped) == 2  # a file of someone's is replaced where that is asked
    assert "give --overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main([*capped, "--overwrite"]) == 0
    assert "capped unet " in capsys.readouterr().out
    assert main([*arguments[:-1]]) == 2
