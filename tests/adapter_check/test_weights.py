"""The figures of an adapter's layers against a float64 SVD of whole updates, and planted faults."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cat_rs
from cat_rs.adapter_check import WeightReport, check_weights
from cat_rs.adapter_file.update import Factors, singular_values
from cat_rs.cli import main
from tests.adapter_file.models import UNET_LAYERS, add_text_lora, clip, flux_transformer, kohya_state
from tests.models import add_lora, tiny_unet


@pytest.fixture
def unet() -> Any:
    return add_lora(tiny_unet(), r=4, lora_alpha=6, target_modules=UNET_LAYERS, rank_pattern={"to_q": 3})


@pytest.fixture
def file(unet: Any, tmp_path: Path) -> Path:
    return cat_rs.save_lora(tmp_path / "a.safetensors", unet)


def kinds(report: WeightReport) -> dict[str, tuple[str, ...]]:
    return {finding.kind: finding.layers for finding in report.findings}


def changed(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The adapter with a fault in it, as a file of kohya's format, where each layer has an alpha."""
    kohya = cat_rs.save_lora(file.parent / "fault.safetensors", cat_rs.load_lora(file), format="kohya", family="sd")
    tensors = load_file(kohya)
    change(tensors)
    save_file(tensors, kohya)
    return kohya


@pytest.mark.parametrize("rslora", [False, True])
def test_figures_are_those_of_the_whole_update(rslora: bool, tmp_path: Path) -> None:
    unet = add_lora(
        tiny_unet(), r=4, lora_alpha=6, target_modules=UNET_LAYERS, rank_pattern={"to_q": 3}, use_rslora=rslora
    )
    path = cat_rs.save_lora(tmp_path / "a.safetensors", unet)
    report = check_weights(path, {"unet": unet})
    modules = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert len(report.layers) == len(modules) > 20
    assert any(module.base_layer.weight.dim() == 4 for module in modules.values())
    for layer in report.layers:
        module = modules[layer.module]
        a, b = (getattr(module, name)["default"].weight.detach().double().flatten(1) for name in ("lora_A", "lora_B"))
        exact = torch.linalg.svdvals(b @ a * module.scaling["default"])
        share = exact / exact.sum()
        share = share[share > 1e-15]
        assert layer.component == "unet"
        assert layer.rank == a.shape[0]
        assert layer.scale == pytest.approx(module.scaling["default"])
        assert layer.largest == pytest.approx(float(exact[0]), rel=1e-10)
        assert layer.norm == pytest.approx(float(exact.norm()), rel=1e-10)
        assert layer.effective_rank == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-6)
        assert layer.first_share == pytest.approx(float(exact[0] ** 2 / exact.square().sum()), rel=1e-10)
        assert layer.relative == pytest.approx(layer.norm / float(module.base_layer.weight.detach().double().norm()))
    assert report.findings == ()


@pytest.mark.parametrize("spread", [1.0, 1e4, 1e9, 1e13, math.inf])
def test_singular_values_of_factors_of_any_condition(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def factor(rows: int) -> torch.Tensor:
        """Of 6 directions, the last as small as the spread says."""
        sizes = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 1.0 / spread], dtype=torch.float64)
        random = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
        turned = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q
        return torch.linalg.qr(random).Q * sizes @ turned

    for rows, columns in ((40, 30), (40, 4), (3, 30), (5, 5)):
        update = Factors(factor(max(rows, 6))[:rows], factor(max(columns, 6))[:columns].T)
        exact = torch.linalg.svdvals(update.B @ update.A)
        values = singular_values(update)
        count = min(rows, columns, 6)
        assert len(values) == count
        torch.testing.assert_close(values, exact[:count], rtol=1e-10, atol=1e-15)


def test_small_matrices_take_one_thread(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    def noting(update: Factors) -> torch.Tensor:
        used.add(torch.get_num_threads())
        return singular_values(update)

    monkeypatch.setattr("cat_rs.adapter_check.weights.singular_values", noting)
    torch.set_num_threads(2)
    check_weights(file)
    assert used == {1}
    assert torch.get_num_threads() == 2


def test_without_the_model_nothing_is_compared_with_it(file: Path) -> None:
    report = check_weights(cat_rs.load_lora(file))
    assert {layer.relative for layer in report.layers} == {None}
    assert report.findings == ()


def test_a_spike_is_named(file: Path) -> None:
    name = "lora_unet_mid_block_resnets_0_conv1"
    path = changed(file, lambda tensors: tensors[f"{name}.lora_up.weight"].mul_(30))
    assert kinds(check_weights(path)) == {"spike": ("unet: mid_block.resnets.0.conv1",)}


def test_values_that_are_not_finite_are_named(file: Path) -> None:
    path = changed(file, lambda tensors: tensors["lora_unet_conv_in.lora_down.weight"][0, 0].fill_(math.nan))
    report = check_weights(path)
    assert kinds(report) == {"not finite": ("unet: conv_in",)}
    assert "conv_in" not in {layer.module for layer in report.layers}
    with pytest.raises(cat_rs.errors.AdapterError, match="conv_in"):
        cat_rs.load_lora(path)


def test_a_wrong_alpha_is_named(file: Path) -> None:
    path = changed(file, lambda tensors: tensors["lora_unet_conv_in.alpha"].fill_(1))
    report = check_weights(path)
    assert kinds(report) == {"scale": ("unet: conv_in",)}
    assert "is not 1.5" in report.findings[0].text


def test_zero_and_equal_layers_are_named(file: Path) -> None:
    def copy(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn{n}_to_q" for n in (1, 2))
        for name in ("lora_up", "lora_down"):
            tensors[f"{second}.{name}.weight"] = tensors[f"{first}.{name}.weight"].clone()
        tensors["lora_unet_conv_in.lora_up.weight"].zero_()

    found = kinds(check_weights(changed(file, copy)))
    assert found["zero"] == ("unet: conv_in",)
    assert len(found["duplicate"]) == 2
    assert all(layer.endswith("to_q") for layer in found["duplicate"])


def test_an_adapter_that_does_nothing_says_so(tmp_path: Path) -> None:
    unet = add_lora(tiny_unet(), start=True)
    report = check_weights(cat_rs.save_lora(tmp_path / "a.safetensors", unet))
    (finding,) = report.findings
    assert finding.text == "the whole adapter does nothing"
    assert {layer.first_share for layer in report.layers} == {None}


def test_layers_that_the_model_does_not_have_are_named(file: Path) -> None:
    less = tiny_unet()
    less.mid_block = None
    found = kinds(check_weights(file, {"unet": less}))
    assert found.keys() == {"absent"}
    assert all("mid_block" in layer for layer in found["absent"])


def test_an_adapter_for_another_model_is_told(file: Path) -> None:
    report = check_weights(file, {"transformer": flux_transformer()})
    assert "it is for another model" in report.findings[0].text
    report = check_weights(file, {"unet": tiny_unet(cross_attention_dim=24, block_out_channels=(32, 64))})
    assert "size" in kinds(report)
    assert "it is for another model" in " ".join(finding.text for finding in report.findings)


def test_an_update_larger_than_its_weight_is_named(unet: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        for name, param in unet.named_parameters():
            if "lora_B" in name:
                param.mul_(1000)
    report = check_weights(cat_rs.save_lora(tmp_path / "a.safetensors", unet), {"unet": unet})
    assert len(kinds(report)["large"]) > len(report.layers) / 2


def test_kohya_names_are_resolved(tmp_path: Path) -> None:
    save_file(kohya_state(), tmp_path / "a.safetensors")
    report = check_weights(tmp_path / "a.safetensors")
    assert {layer.scale for layer in report.layers} == {0.5, 1.0}
    assert report.format == "kohya"


def test_a_text_encoder_with_other_spellings_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.15.0")
    encoder = clip()
    add_text_lora(encoder, seed=1, r=2)
    path = cat_rs.save_lora(tmp_path / "a.safetensors", None, text_encoder=encoder)
    assert check_weights(path, {"text_encoder": encoder}).findings == ()


def test_the_command_prints_and_writes(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spiked = changed(file, lambda tensors: tensors["lora_unet_conv_in.lora_up.weight"].mul_(50))
    output = tmp_path / "new"
    assert main(["check", str(file), f"other={spiked}", "--output-dir", str(output)]) == 0
    text = capsys.readouterr().out
    assert "rank 3, 4, scale" in text
    assert "nothing out of line" in text
    assert "spike" in text
    assert "unet: conv_in" in text
    content = json.loads((output / "check.json").read_text())["adapters"]
    assert content["a"]["weights"]["findings"] == []
    assert content["other"]["weights"]["findings"][0]["kind"] == "spike"
    assert main(["check", str(file), "--output-dir", str(output)]) == 2
    assert main(["check", str(tmp_path / "none.safetensors")]) == 2
    assert main(["check"]) == 2
