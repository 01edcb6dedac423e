"""patch_peft and adapter_disabled: the same results, state and switches as PEFT's own layers."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer

import cat_rs
from cat_rs.errors import AdapterError
from cat_rs.peft import FusedLinear
from tests.models import LAYERS, add_lora, batch, randomize_b, tiny_unet
from tests.tolerances import assert_close, max_abs

# PEFT warns of every second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

CONVOLUTIONS = [*LAYERS, "conv1", "conv_in"]


@functools.cache
def _base() -> torch.nn.Module:
    return tiny_unet()


def base_model() -> torch.nn.Module:
    return copy.deepcopy(_base())


@functools.cache
def _adapted() -> torch.nn.Module:
    return add_lora(base_model())


def adapted_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return copy.deepcopy(_adapted()).to(dtype)


def output(model: torch.nn.Module, number: int = 0) -> torch.Tensor:
    one = batch(number, dtype=next(model.parameters()).dtype)
    return model(one["latents"], one["timesteps"], one["cond"], return_dict=False)[0]


def result(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The output, and the gradient of every trainable parameter and of the latents."""
    one = batch(0, dtype=next(model.parameters()).dtype)
    latents = one["latents"].requires_grad_()
    prediction = model(latents, one["timesteps"], one["cond"], return_dict=False)[0]
    names, params = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad], strict=True)
    grads = torch.autograd.grad(prediction.square().sum(), [latents, *params], allow_unused=True)
    found = zip(["output", "latents", *names], [prediction, *grads], strict=True)
    return {name: value.detach() for name, value in found if value is not None}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], factor: float = 20) -> None:
    """Equal up to rounding; the factor is for what a dozen layers add up."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_close(ours[name], value, factor=factor, scale=max_abs(value), label=name)


def adapter_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def flags(model: torch.nn.Module) -> list[bool]:
    return [param.requires_grad for param in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
def test_output_and_gradients_stay(dtype: torch.dtype) -> None:
    model = adapted_model(dtype)
    expected = result(model)
    report = cat_rs.patch_peft(model)
    assert len(report.fused) == len(adapter_layers(model))
    assert not report.kept
    assert_same(result(model), expected)


def test_rslora() -> None:
    model = add_lora(base_model(), use_rslora=True, r=3, lora_alpha=5)
    expected = result(model)
    cat_rs.patch_peft(model)
    assert_same(result(model), expected)


def test_state_dict_and_parameters_stay() -> None:
    model = adapted_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, trainable = dict(model.named_parameters()), flags(model)
    cat_rs.patch_peft(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(param is parameters[name] for name, param in model.named_parameters())
    assert flags(model) == trainable
    model.load_state_dict(state)


def test_unpatch_gives_pefts_layers_back() -> None:
    model = adapted_model()
    expected, attributes = output(model), [set(vars(layer)) for layer in adapter_layers(model)]
    cat_rs.patch_peft(model)
    cat_rs.unpatch_peft(model)
    assert all(type(layer) is PeftLinear for layer in adapter_layers(model))
    assert [set(vars(layer)) for layer in adapter_layers(model)] == attributes
    assert torch.equal(output(model), expected)


def test_patching_twice_is_patching_once() -> None:
    model = adapted_model()
    first = cat_rs.patch_peft(model)
    expected = output(model)
    assert cat_rs.patch_peft(model) == first
    assert torch.equal(output(model), expected)
    with cat_rs.adapter_disabled(model):
        assert torch.equal(output(model), output(base_model()))


def test_layers_added_later_are_picked_up() -> None:
    model = adapted_model()
    cat_rs.patch_peft(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["proj_in", "to_k"], init_lora_weights=False), "second")
    report = cat_rs.patch_peft(model)
    # proj_in is a convolution in this model.
    assert any("proj_in" in name for name in [*report.fused, *report.kept])
    with cat_rs.adapter_disabled(model):
        assert torch.equal(output(model), output(base_model()))


def test_layers_added_after_patching_are_disabled_too() -> None:
    model = adapted_model()
    cat_rs.patch_peft(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["time_emb_proj"], init_lora_weights=False), "second")
    model.set_adapters(["default", "second"])
    with cat_rs.adapter_disabled(model):
        assert torch.equal(output(model), output(base_model()))


def _dropout(model: torch.nn.Module) -> torch.nn.Module:
    return add_lora(model, lora_dropout=0.5).train()


def _dora(model: torch.nn.Module) -> torch.nn.Module:
    return add_lora(model, use_dora=True)


def _two_active(model: torch.nn.Module) -> torch.nn.Module:
    add_lora(model)
    model.add_adapter(LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False), "second")
    model.set_adapters(["default", "second"], [0.7, 0.5])
    return model


def _second_active(model: torch.nn.Module) -> torch.nn.Module:
    add_lora(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), "second")
    model.set_adapter("second")
    return model


def _scaled(model: torch.nn.Module) -> torch.nn.Module:
    add_lora(model)
    for layer in adapter_layers(model):
        layer.set_scale("default", 0.3)
    return model


def _lora_bias(model: torch.nn.Module) -> torch.nn.Module:
    return add_lora(model, lora_bias=True, target_modules=["to_out.0"])


def _trained_bias(model: torch.nn.Module) -> torch.nn.Module:
    config = LoraConfig(r=2, target_modules=["to_out.0"], bias="lora_only", init_lora_weights=False)
    return get_peft_model(model, config)


def _all_biases(model: torch.nn.Module) -> torch.nn.Module:
    config = LoraConfig(r=2, target_modules=["to_out.0"], bias="all", init_lora_weights=False)
    return get_peft_model(model, config)


def _convolutions(model: torch.nn.Module) -> torch.nn.Module:
    return add_lora(model, target_modules=CONVOLUTIONS)


def _module_to_save(model: torch.nn.Module) -> torch.nn.Module:
    config = LoraConfig(r=2, target_modules=LAYERS, modules_to_save=["conv_out"], init_lora_weights=False)
    model = get_peft_model(model, config)
    with torch.no_grad():
        model.base_model.model.conv_out.modules_to_save["default"].weight.add_(0.1)
    return model


def _disabled(model: torch.nn.Module) -> torch.nn.Module:
    add_lora(model).disable_adapters()
    model.conv_out.requires_grad_()
    return model


VARIANTS: list[Callable[[torch.nn.Module], torch.nn.Module]] = [
    _dropout,
    _dora,
    _two_active,
    _second_active,
    _scaled,
    _lora_bias,
    _trained_bias,
    _all_biases,
    _convolutions,
    _module_to_save,
    _disabled,
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__.lstrip("_"))
def test_what_is_not_fused_gives_pefts_results(variant: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    model = variant(base_model())

    def seeded() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return result(model)

    expected = seeded()
    cat_rs.patch_peft(model)
    assert_same(seeded(), expected)


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
@pytest.mark.parametrize("variant", [add_lora, *VARIANTS], ids=lambda variant: variant.__name__.lstrip("_"))
def test_disabled_is_exactly_the_base_model(variant: Callable[[torch.nn.Module], Any], patched: bool) -> None:
    model = variant(base_model())
    if patched:
        cat_rs.patch_peft(model)
    with torch.no_grad():
        torch.manual_seed(0)
        before = output(model)
        with cat_rs.adapter_disabled(model):
            assert torch.equal(output(model), output(_base()))
        torch.manual_seed(0)
        assert torch.equal(output(model), before)


def test_merged_weights_run_and_refuse_to_be_disabled() -> None:
    model = adapted_model()
    expected = output(model).detach()
    cat_rs.patch_peft(model)
    for layer in adapter_layers(model):
        layer.merge()
    assert_close(output(model), expected, factor=20, scale=max_abs(expected))
    with pytest.raises(AdapterError, match="must not be merged"), cat_rs.adapter_disabled(model):
        output(model)
    for layer in adapter_layers(model):
        layer.unmerge()
    assert_close(output(model), expected, factor=20, scale=max_abs(expected))


def test_autocast_gives_pefts_results() -> None:
    model = adapted_model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = result(model)
        cat_rs.patch_peft(model)
        assert_same(result(model), expected)


def test_dropout_fuses_in_eval_mode() -> None:
    model = add_lora(base_model(), lora_dropout=0.5).eval()
    expected = result(model)
    cat_rs.patch_peft(model)
    assert_same(result(model), expected)


def test_kept_layers_are_reported_with_their_reason() -> None:
    report = cat_rs.patch_peft(add_lora(base_model(), target_modules=CONVOLUTIONS))
    assert report.fused
    assert all(name.split(".")[-1] in ("conv1", "conv_in") for name in report.kept)
    assert set(report.kept.values()) == {"Conv2d layers are not fused"}


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
def test_disabling_nests_and_survives_exceptions(patched: bool) -> None:
    model = add_lora(base_model(), target_modules=CONVOLUTIONS)
    if patched:
        cat_rs.patch_peft(model)
    adapted, base, trainable = output(model), output(base_model()), flags(model)
    with cat_rs.adapter_disabled(model):
        with cat_rs.adapter_disabled(model):
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
        assert flags(model) == trainable
    assert torch.equal(output(model), adapted)
    with pytest.raises(ZeroDivisionError), cat_rs.adapter_disabled(model):
        _ = 1 / 0
    assert torch.equal(output(model), adapted)
    assert flags(model) == trainable


def test_a_model_that_peft_disabled_stays_disabled() -> None:
    model = _convolutions(base_model())
    cat_rs.patch_peft(model)
    model.disable_adapters()
    base = output(base_model())
    with cat_rs.adapter_disabled(model):
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), base)
    model.enable_adapters()
    assert not torch.equal(output(model), base)


def test_a_copy_has_its_own_switch() -> None:
    model = adapted_model()
    cat_rs.patch_peft(model)
    adapted, base = output(model), output(base_model())
    twin = copy.deepcopy(model)
    with cat_rs.adapter_disabled(model):
        assert torch.equal(output(twin), adapted)
        assert torch.equal(output(model), base)
    with cat_rs.adapter_disabled(twin):
        assert torch.equal(output(twin), base)
        assert torch.equal(output(model), adapted)
    assert all(isinstance(layer, FusedLinear) for layer in adapter_layers(twin))


def test_a_patched_model_can_be_pickled() -> None:
    model = adapted_model()
    cat_rs.patch_peft(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(output(loaded), output(model))
    with cat_rs.adapter_disabled(loaded):
        assert torch.equal(output(loaded), output(base_model()))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = adapted_model().train()
    expected = result(model)
    cat_rs.patch_peft(model)

    def checkpoint(module: torch.nn.Module, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=use_reentrant)

    model.enable_gradient_checkpointing(checkpoint)
    one = batch(0)
    prediction = model(one["latents"].requires_grad_(), one["timesteps"], one["cond"], return_dict=False)[0]
    with cat_rs.adapter_disabled(model), torch.no_grad():
        assert torch.equal(output(model), output(base_model()))
    prediction.square().sum().backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], factor=20, scale=max_abs(expected[name]), label=name)


def test_saved_names_and_values_stay(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted_model()
    names = set(get_peft_model_state_dict(model))
    model.save_lora_adapter(tmp_path / "before")
    cat_rs.patch_peft(model)
    assert set(get_peft_model_state_dict(model)) == names
    model.save_lora_adapter(tmp_path / "after")
    before, after = (
        load_file(tmp_path / folder / "pytorch_lora_weights.safetensors") for folder in ("before", "after")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_saving_after_training_and_loading_again(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    model = adapted_model()
    step = cat_rs.CatStep(model, DDPMScheduler(), lr=0.1)
    step(**batch(0))
    # Its parameters are views of one buffer, which must not be written whole for each of them.
    model.save_lora_adapter(tmp_path)
    size = sum(param.numel() for param in step.trainable.values()) * 4
    assert (tmp_path / "pytorch_lora_weights.safetensors").stat().st_size < 2 * size + 20_000
    loaded = base_model()
    loaded.load_lora_adapter(
        tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
    )
    assert_close(output(loaded), output(model).detach(), factor=20, scale=max_abs(output(model)))


def test_a_model_without_adapter_is_named() -> None:
    with pytest.raises(AdapterError, match=r"^patch_peft: `model` must have PEFT adapter layers .* got none"):
        cat_rs.patch_peft(base_model())


def test_disabling_and_unpatching_a_model_without_adapter_do_nothing() -> None:
    model = base_model()
    expected = output(model)
    cat_rs.unpatch_peft(model)
    with cat_rs.adapter_disabled(model):
        assert torch.equal(output(model), expected)


def test_training_reaches_every_adapter() -> None:
    model = adapted_model()
    randomize_b(model)
    cat_rs.patch_peft(model)
    output(model).square().sum().backward()
    for name, param in model.named_parameters():
        assert (param.grad is not None) == ("lora_" in name), name
