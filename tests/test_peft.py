"""patch_peft and adapter_disabled: the same results, state and switches as PEFT's own layers."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer

import cat_rs
from cat_rs import frozen_layers
from cat_rs.errors import AdapterError
from cat_rs.peft import FusedLinear, lower_dtype
from tests.models import LAYERS, add_lora, batch, randomize_b, tiny_unet
from tests.tolerances import assert_close, max_abs

# PEFT warns of every second adapter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
]

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


def result(model: torch.nn.Module, number: int = 0) -> dict[str, torch.Tensor]:
    """The output, and the gradient of every trainable parameter and of the latents."""
    one = batch(number, dtype=next(model.parameters()).dtype)
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


def assert_as_exact(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """Ours are as near to float64 arithmetic as theirs: for dtypes whose rounding is all one sees."""
    assert ours.keys() == theirs.keys() == exact.keys()

    def distance(values: dict[str, torch.Tensor]) -> float:
        return float(sum((values[name].double() - exact[name]).square().sum() for name in exact)) ** 0.5

    # Two runs' rounding differs by chance; in float64 there is none to compare.
    assert distance(ours) <= 1.25 * distance(theirs) + 1e-12


def adapter_layers(model: torch.nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def flags(model: torch.nn.Module) -> list[bool]:
    return [param.requires_grad for param in model.parameters()]


DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()])
@pytest.mark.parametrize("targets", [LAYERS, CONVOLUTIONS], ids=["linear", "convolutions"])
def test_output_and_gradients_stay(targets: list[str], dtype: torch.dtype) -> None:
    model = add_lora(base_model(), target_modules=targets).to(dtype)
    exact, expected = result(copy.deepcopy(model).double()), result(model)
    report = cat_rs.patch_peft(model)
    assert len(report.fused) == len(adapter_layers(model))
    assert not report.kept
    if dtype in (torch.float32, torch.float64):
        assert_same(result(model), expected)
    assert_as_exact(result(model), expected, exact)


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
    assert all(type(layer) is lora.Linear for layer in adapter_layers(model))
    assert [set(vars(layer)) for layer in adapter_layers(model)] == attributes
    assert torch.equal(output(model), expected)


def test_large_frozen_convolutions_are_patched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_layers, "max_output_positions", lambda weights: 128)
    model = _convolutions(base_model())
    expected = result(model)
    report = cat_rs.patch_peft(model)
    plain = [name for name, module in model.named_modules() if isinstance(module, frozen_layers.FrozenConv2d)]
    assert report.convolutions == plain
    assert {"conv_out", "conv_in.base_layer"} <= set(plain)
    assert_same(result(model), expected)
    cat_rs.unpatch_peft(model)
    assert not any(isinstance(module, frozen_layers.FrozenConv2d) for module in model.modules())


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
    assert any("proj_in" in name for name in report.fused)
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


def _convolutions_with_everything(model: torch.nn.Module) -> torch.nn.Module:
    add_lora(model, target_modules=CONVOLUTIONS, lora_dropout=0.3)
    config = LoraConfig(r=2, target_modules=["conv1", "to_out.0"], lora_bias=True, init_lora_weights=False)
    model.add_adapter(config, "second")
    model.set_adapters(["default", "second"], [0.7, 0.5])
    return model.train()


def _patterns(model: torch.nn.Module) -> torch.nn.Module:
    patterns = {"rank_pattern": {"to_k": 2, "conv1": 3}, "alpha_pattern": {"to_v": 16}}
    return add_lora(model, target_modules=CONVOLUTIONS, **patterns)


def _grouped_convolution(model: torch.nn.Module) -> torch.nn.Module:
    model.conv_out = torch.nn.Conv2d(8, 4, 3, padding=1, groups=2)
    model.requires_grad_(False)
    torch.manual_seed(4)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    return add_lora(model, target_modules=["conv_out", "to_k"])


def _channels_last(model: torch.nn.Module) -> torch.nn.Module:
    return _convolutions(model).to(memory_format=torch.channels_last)


def _hooks(model: torch.nn.Module) -> torch.nn.Module:
    _convolutions(model)
    layers = adapter_layers(model)
    layers[0].base_layer.register_forward_hook(lambda module, inputs, y: 2 * y)
    layers[1].lora_B["default"].register_forward_pre_hook(lambda module, inputs: (-inputs[0],))
    layers[2].lora_A["default"].register_forward_hook(lambda module, inputs, y: y + 1)
    return model


def _float32_adapter(model: torch.nn.Module) -> torch.nn.Module:
    from diffusers.training_utils import cast_training_params

    add_lora(model.to(torch.bfloat16))
    cast_training_params(model, torch.float32)
    return model


def with_float32_adapters(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model in a lower dtype with its adapters in float32, as mixed-precision training has it."""
    for name, param in model.to(dtype).named_parameters():
        if "lora_" in name:
            # New values, which the lower dtype does not hold.
            param.data = param.data.float() + 1e-3 * torch.randn(param.shape)
    return model


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
    _convolutions_with_everything,
    _patterns,
    _module_to_save,
    _disabled,
]
# These also change what the model computes without its adapter.
CHANGED_BASES = [_grouped_convolution, _channels_last, _hooks]


@pytest.mark.parametrize("variant", [*VARIANTS, *CHANGED_BASES], ids=lambda variant: variant.__name__.lstrip("_"))
def test_every_state_gives_pefts_results(variant: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    model = variant(base_model())

    def seeded() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return result(model)

    expected = seeded()
    cat_rs.patch_peft(model)
    assert_same(seeded(), expected)


@pytest.mark.parametrize("variant", [*VARIANTS, _float32_adapter], ids=lambda variant: variant.__name__.lstrip("_"))
def test_every_state_is_as_exact_under_autocast_as_pefts(
    variant: Callable[[torch.nn.Module], torch.nn.Module],
) -> None:
    model = variant(base_model())

    def run(model: torch.nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        # Several batches: the rounding of one is chance.
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found = [result(model, number) for number in range(4)]
        return {f"{number} {name}": value for number, each in enumerate(found) for name, value in each.items()}

    exact, theirs = run(copy.deepcopy(model).double(), None), run(model, torch.bfloat16)
    cat_rs.patch_peft(model)
    assert_as_exact(run(model, torch.bfloat16), theirs, exact)


LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
FUSED_WHOLE = [variant for variant in VARIANTS if variant not in (_dora, _module_to_save, _disabled)]


def refuse_pefts_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("PEFT's own forward ran")

    monkeypatch.setattr(lora.Linear, "forward", refuse)
    monkeypatch.setattr(lora.Conv2d, "forward", refuse)


@LOW
@pytest.mark.parametrize("variant", [add_lora, *FUSED_WHOLE], ids=lambda variant: variant.__name__.lstrip("_"))
def test_float32_adapters_over_a_lower_dtype_are_fused_and_as_exact_as_pefts(
    variant: Callable[[torch.nn.Module], torch.nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_float32_adapters(variant(base_model()), dtype)

    def run(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        # Several batches: the rounding of one is chance.
        found = [result(model, number) for number in range(8)]
        return {f"{number} {name}": value for number, each in enumerate(found) for name, value in each.items()}

    exact, theirs = run(copy.deepcopy(model).double()), run(model)
    report = cat_rs.patch_peft(model)
    assert report.fused
    assert set(report.kept.values()) <= {"no adapter is active"}
    if not report.kept:
        refuse_pefts_forward(monkeypatch)
    ours = run(model)
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    assert_as_exact(ours, theirs, exact)


ONE_LAYER: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: torch.nn.Linear(24, 17), (2, 9, 24)),
    "linear-vector": (lambda: torch.nn.Linear(5, 7, bias=False), (5,)),
    "linear-wide": (lambda: torch.nn.Linear(320, 64), (1, 77, 320)),
    "conv": (lambda: torch.nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 7)),
    "conv-strided": (lambda: torch.nn.Conv2d(4, 9, 3, stride=2, bias=False), (1, 4, 9, 6)),
    "conv-pointwise": (lambda: torch.nn.Conv2d(8, 5, 1), (3, 8, 1, 4)),
}


@LOW
@pytest.mark.parametrize(("layer", "shape"), [pytest.param(*row, id=name) for name, row in ONE_LAYER.items()])
def test_a_layer_with_a_float32_adapter(
    layer: Callable[[], torch.nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    model = with_float32_adapters(get_peft_model(torch.nn.Sequential(layer()), config), dtype)
    x = torch.randn(shape).to(dtype)
    upstream = torch.randn_like(model(x)).detach()

    def run(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = model(leaf)
        params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        grads = torch.autograd.grad(y, [leaf, *params.values()], upstream.to(dtype))
        return dict(zip(["y", "x", *params], [y, *grads], strict=True))

    exact, theirs = run(copy.deepcopy(model).double(), torch.float64), run(model, dtype)
    assert len(cat_rs.patch_peft(model).fused) == 1
    for name, ours in run(model, dtype).items():
        assert ours.dtype == theirs[name].dtype
        for other in (exact, theirs):
            # The branch rounds its weights and the hidden product too.
            assert_close(ours, other[name], dtype=dtype, factor=4, scale=max_abs(exact[name]), label=name)


@LOW
def test_the_switch_and_merging_with_float32_adapters(dtype: torch.dtype) -> None:
    model = with_float32_adapters(_convolutions(base_model()), dtype)
    base, merged = output(base_model().to(dtype)), []
    for patched in (False, True):
        twin = copy.deepcopy(model)
        if patched:
            cat_rs.patch_peft(twin)
        for layer in adapter_layers(twin):
            layer.merge()
        merged.append(output(twin))
    assert torch.equal(*merged)
    cat_rs.patch_peft(model)
    with cat_rs.adapter_disabled(model):
        assert torch.equal(output(model), base)
    assert not torch.equal(output(model), base)


def test_the_lower_dtype_of_models() -> None:
    def model_in(dtype: torch.dtype, variant: Any = add_lora) -> torch.nn.Module:
        model = with_float32_adapters(variant(base_model()), dtype)
        cat_rs.patch_peft(model)
        return model

    bf16, f16, f32 = model_in(torch.bfloat16), model_in(torch.float16, _convolutions), model_in(torch.float32)
    assert lower_dtype([bf16]) == lower_dtype([f32, bf16]) == torch.bfloat16
    assert lower_dtype([f16]) == torch.float16
    # Of several dtypes none is the adapters'; and no other adapter or layer needs one.
    for models in ([], [f32], [bf16, f16], [model_in(torch.bfloat16, _dora)]):
        assert lower_dtype(models) is None
    assert lower_dtype([bf16.to(torch.bfloat16)]) is None


@LOW
def test_fused_layers_stay_fused_under_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _convolutions(base_model())
    cat_rs.patch_peft(model)
    refuse_pefts_forward(monkeypatch)
    with torch.autocast("cpu", dtype):
        assert output(model).isfinite().all()


def test_dropout_fuses_in_training() -> None:
    model = add_lora(base_model(), lora_dropout=0.5).train()
    assert not cat_rs.patch_peft(model).kept


def test_second_derivatives_are_pefts() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(36, 5)]
    config = LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(*layers), config)
    pictures = torch.randn(2, 3, 5, 5, requires_grad=True)

    def penalty() -> torch.Tensor:
        (slope,) = torch.autograd.grad(model(pictures).square().sum(), pictures, create_graph=True)
        params = [param for param in model.parameters() if param.requires_grad]
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(slope.square().sum(), params)])

    expected = penalty()
    assert len(cat_rs.patch_peft(model).fused) == 2
    assert_close(penalty(), expected, factor=20, scale=max_abs(expected))


def _half_adapter(model: torch.nn.Module) -> torch.nn.Module:
    add_lora(model)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = param.data.half()
    return model


def _float32_in_float64(model: torch.nn.Module) -> torch.nn.Module:
    return with_float32_adapters(add_lora(model), torch.float64)


KEPT = {
    "lower-adapter": (_half_adapter, "adapter 'default' is in float16, the base layer in float32"),
    "float64-base": (_float32_in_float64, "adapter 'default' is in float32, the base layer in float64"),
    "dora": (_dora, "adapter 'default' is a Dora"),
    "groups": (_grouped_convolution, "the convolution has groups"),
    "modules_to_save": (_module_to_save, "ModulesToSaveWrapper layers are not fused"),
}


@pytest.mark.parametrize(("variant", "reason"), [pytest.param(*row, id=name) for name, row in KEPT.items()])
def test_kept_layers_are_reported_with_their_reason(
    variant: Callable[[torch.nn.Module], torch.nn.Module], reason: str
) -> None:
    kept = cat_rs.patch_peft(variant(base_model())).kept
    assert kept
    assert all(text.startswith(reason) for text in kept.values())


def test_hooks_are_reported() -> None:
    report = cat_rs.patch_peft(_hooks(base_model()))
    assert len(report.kept) == 3
    assert all("hooks" in reason for reason in report.kept.values())


def test_other_layers_are_kept_and_switched() -> None:
    class Text(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(10, 8)
            self.line = torch.nn.Conv1d(8, 8, 3, padding=1)
            self.last = torch.nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.last(self.line(self.embed(ids).mT).mT)

    torch.manual_seed(0)
    base = Text().requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["embed", "line", "last"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    ids = torch.arange(6).view(2, 3)
    expected = model(ids)
    report = cat_rs.patch_peft(model)
    assert [name.split(".")[-1] for name in report.fused] == ["last"]
    assert set(report.kept.values()) == {"Embedding layers are not fused", "Conv1d layers are not fused"}
    assert_close(model(ids), expected, factor=4, scale=max_abs(expected))
    with cat_rs.adapter_disabled(model):
        assert torch.equal(model(ids), base(ids))


def test_an_adapter_for_each_sample() -> None:
    model = get_peft_model(base_model(), LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False))
    model.eval()
    names = ["one", "two", "__base__"]
    one = batch(0, 3)

    def run() -> torch.Tensor:
        layer = next(layer for layer in adapter_layers(model) if isinstance(layer, lora.Linear))
        return layer(one["cond"][..., : layer.in_features], adapter_names=names)

    expected = run()
    cat_rs.patch_peft(model)
    assert torch.equal(run(), expected)


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


@pytest.mark.parametrize("backward_disabled", [False, True], ids=["backward-on", "backward-off"])
@pytest.mark.parametrize("forward_disabled", [False, True], ids=["forward-on", "forward-off"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_a_checkpointed_block_is_recomputed_as_it_was_run(
    use_reentrant: bool, forward_disabled: bool, backward_disabled: bool
) -> None:
    model = _module_to_save(base_model()).train()
    inner = model.base_model.model
    cat_rs.patch_peft(model)

    def gradients() -> dict[str, torch.Tensor]:
        one = batch(0)
        latents = one["latents"].requires_grad_()
        with cat_rs.adapter_disabled(model) if forward_disabled else contextlib.nullcontext():
            prediction = model(latents, one["timesteps"], one["cond"], return_dict=False)[0]
        model.zero_grad()
        with cat_rs.adapter_disabled(model) if backward_disabled else contextlib.nullcontext():
            prediction.square().sum().backward()
        params = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
        return {"latents": latents.grad, **params}

    expected = gradients()

    def checkpoint(module: torch.nn.Module, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=use_reentrant)

    inner.enable_gradient_checkpointing(checkpoint)
    with cat_rs.adapter_disabled(model):
        pass  # checkpointing that was switched on after patching is noticed here
    assert_same(gradients(), expected)
    cat_rs.unpatch_peft(model)
    functions = {getattr(block, "_gradient_checkpointing_func", None) for block in inner.modules()}
    assert functions == {checkpoint, None}


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


@pytest.mark.parametrize("patch_first", [True, False])
def test_offloaded_models_run_pefts_forward(patch_first: bool) -> None:
    from accelerate import cpu_offload

    model = adapted_model()
    if patch_first:
        cat_rs.patch_peft(model)
    with torch.no_grad():
        expected, base = output(adapted_model()), output(base_model())
        # What enable_sequential_cpu_offload does to each part of a pipeline: weights are on meta between calls.
        cpu_offload(model, execution_device=torch.device("cpu"))
        report = cat_rs.patch_peft(model)
        assert not report.fused
        assert set(report.kept.values()) <= {"its weights are offloaded", "the base layer has hooks"}
        assert_close(output_of_offloaded(model), expected, factor=20, scale=max_abs(expected))
        with cat_rs.adapter_disabled(model):
            assert_close(output_of_offloaded(model), base, factor=20, scale=max_abs(base))


def output_of_offloaded(model: torch.nn.Module) -> torch.Tensor:
    one = batch(0)
    return model(one["latents"], one["timesteps"], one["cond"], return_dict=False)[0]
